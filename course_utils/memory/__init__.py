"""The memory of a training step, predicted and measured."""

from course_utils.memory.estimate import (
    PARTS,
    MemoryEstimate,
    estimate_memory,
    measure_memory,
    t4_plan,
)
from course_utils.memory.formula import GIB, GPUS, KNOWN_MODELS, gpu_gib, model_config
