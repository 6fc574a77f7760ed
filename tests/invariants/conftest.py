from tests.matrix import one_thread  # noqa: F401
