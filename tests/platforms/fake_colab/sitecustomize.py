"""A pretended Colab: every Python process with this on PYTHONPATH has `google.colab`.

`drive.mount` makes a folder MyDrive under the mount point, and `files.download` copies
into the folder that FAKE_COLAB_DOWNLOADS names.
"""

import importlib
import importlib.machinery
import os
import shutil
import sys
import types


def _mount(mountpoint, force_remount=False):
    os.makedirs(os.path.join(mountpoint, "MyDrive"), exist_ok=True)
    print(f"Mounted at {mountpoint}")


def _download(filename):
    if not os.path.isfile(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")
    shutil.copy(filename, os.environ["FAKE_COLAB_DOWNLOADS"])


def _module(name, **parts):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # accelerate looks
    vars(module).update(parts)
    sys.modules[name] = module
    return module


def _parent():
    try:
        return importlib.import_module("google")  # protobuf's, if it is installed
    except ModuleNotFoundError:
        return _module("google", __path__=[])


_parent().colab = _module(
    "google.colab",
    drive=_module("google.colab.drive", mount=_mount),
    files=_module("google.colab.files", download=_download),
)
