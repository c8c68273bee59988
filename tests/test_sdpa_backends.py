"""cuDNN's attention is left out inside passes, and is back behind the last of them."""

import threading

import pytest
import torch

from rag_blockcache.sdpa_backends import without_cudnn

backends = torch.backends.cuda


@pytest.fixture
def _switches():
    before = backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled()
    yield
    backends.enable_cudnn_sdp(before[0])
    backends.enable_flash_sdp(before[1])


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize("was_enabled", [True, False])
def test_cudnn_is_off_inside_and_as_it_was_outside(was_enabled):
    backends.enable_cudnn_sdp(was_enabled)
    with without_cudnn():
        assert not backends.cudnn_sdp_enabled()
        with without_cudnn():
            assert not backends.cudnn_sdp_enabled()
        assert not backends.cudnn_sdp_enabled()
    assert backends.cudnn_sdp_enabled() == was_enabled


@pytest.mark.usefixtures("_switches")
def test_the_last_of_several_threads_switches_it_on_again():
    backends.enable_cudnn_sdp(True)
    is_inside, may_leave = threading.Event(), threading.Event()

    def other():
        with without_cudnn():
            is_inside.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with without_cudnn():
        thread.start()
        assert is_inside.wait(10)
    assert not backends.cudnn_sdp_enabled()
    may_leave.set()
    thread.join()
    assert backends.cudnn_sdp_enabled()


@pytest.mark.usefixtures("_switches")
def test_it_stays_where_the_user_left_no_other():
    backends.enable_cudnn_sdp(True)
    backends.enable_flash_sdp(False)
    with without_cudnn():
        assert backends.cudnn_sdp_enabled()
