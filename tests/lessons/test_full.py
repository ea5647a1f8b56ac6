"""Lesson 2: what its cells hold while they compare gradients."""

from cells import cells
from small_models import random_llama
from small_training import batch

from course_utils.memory import measure_memory


def test_two_halves_and_the_whole_are_three_gradients_in_memory():
    lesson = cells("02_full_fine_tuning", "imports", "gradients")
    lesson.model = random_llama(hidden_size=256, intermediate_size=1024)
    parameters = sum(p.numel() for p in lesson.model.parameters())
    with measure_memory("allocator") as used:
        lesson.large = lesson.gradient(batch(2))
        lesson.gradients = [lesson.gradient(batch(1)), lesson.gradient(batch(1))]
        assert lesson.apart(0.5) > 0.1
    assert used.added_bytes <= 3.5 * 4 * parameters
