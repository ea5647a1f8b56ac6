"""Companion package of the course Fine-Tuning in the Open.

Import the module that you need, for example ``from course_utils.models import
load_model``; importing the package itself loads nothing heavy.
"""

__version__ = "0.1.0"
