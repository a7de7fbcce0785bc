"""Copies in memory at other ranks, of real trainings: one rank forgets all it has, and training goes on."""

import pytest

pytestmark = pytest.mark.ranks(3)

V, T, B = 29, 8, 2


@pytest.mark.parametrize(("update", "stage"), [("zero", 2), ("master", 1)])
def test_what_a_rank_has_forgotten_is_given_back(connected, told, update, stage):
    if update == "master" and connected.size > 3:
        pytest.skip("up to three ranks show it")
    import keras
    import numpy as np

    from tf_dist.models import transformer
    from tf_dist.training.in_memory_checkpoint import PeerCheckpoints
    from tf_dist.training.snapshot import recover, snapshot_of
    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    trainer = Trainer(
        transformer.build(V, T, 1, 32, 2), keras.optimizers.AdamW(1e-2), connected, update, zero_stage=stage,
        clip_norm=0.0, global_batch_size=B * 4, micro_batch_size=B, seq_len=T, seed=3, autotune="off",
    )  # fmt: skip
    tokens = np.arange(1500) ** 2 % V
    peers = PeerCheckpoints()
    trainer.fit(tokens, steps=2)
    at_2 = trainer.check_equal()
    trainer.gather_state()
    peers.save(snapshot_of(trainer, {"a fact": 5}))
    trainer.fit(tokens, steps=2)
    at_4 = trainer.check_equal()
    if connected.rank == 1:
        peers.forget()
    found = recover([peers], trainer)
    if connected.size == 1:
        assert found is None
        return
    assert found.step == trainer.step == 2 and found.source is peers and not told.messages
    assert trainer.tokens == 2 * B * 4 * T
    assert trainer.check_equal() == at_2
    trainer.fit(tokens, steps=4)
    assert trainer.check_equal() == at_4
