"""The formulas against counts by hand, and against the models themselves."""

import pytest

from tf_dist.bench import flops, memory, models, nanogpt, scaling
from tf_dist.config import Config


def test_operations_of_a_transformer_counted_by_hand():
    sizes = {"model": "transformer", "layers": 1, "width": 2, "heads": 1, "seq_len": 3}
    query_key_value, projection, feed_forward, logits = 2 * 6, 2 * 2, 2 * 8 + 8 * 2, 2 * 5
    scores, values = 3 * 2, 3 * 2  # for each token: 3 others, 2 wide
    forward = 2 * (query_key_value + projection + feed_forward + logits + scores + values)
    assert flops.per_token(sizes, vocabulary=5) == 3 * forward == 420


def test_operations_of_an_lstm_counted_by_hand():
    sizes = {"model": "lstm", "layers": 2, "width": 3, "heads": 1, "seq_len": 7}
    each_layer, logits = 4 * 3 * (3 + 3), 3 * 5  # four gates, from the input and from the state
    assert flops.per_token(sizes, vocabulary=5) == 3 * 2 * (2 * each_layer + logits)


def test_a_step_has_all_tokens():
    assert flops.of_step(models.GPT, 4) == 4 * 256 * flops.per_token(models.GPT)


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-lstm"])
def test_the_models_have_the_matrices_of_the_formula(name):
    from tf_dist.models.build import build

    sizes = models.RECIPES[name].sizes
    model = build(Config(vocab_size=models.VOCABULARY, **sizes))
    # The embedding is the matrix of the logits as well; positions are only added.
    matrices = sum(
        int(v.shape[0] * v.shape[1])
        for v in model.trainable_variables
        if len(v.shape) == 2 and not v.path.startswith("positions")
    )
    attention = 12 * sizes["layers"] * sizes["seq_len"] * sizes["width"] * (sizes["model"] != "lstm")
    assert flops.per_token(sizes) == 6 * matrices + attention


def test_the_peak_is_operations_over_time():
    assert flops.peak_per_s(1e3) == 2 * flops.PEAK_PRODUCTS * flops.PEAK_SIZE**3


def test_memory_counted_by_hand():
    sizes = {"model": "transformer", "layers": 1, "width": 2, "heads": 3, "seq_len": 4}
    terms = memory.formula(sizes, parameters=100, ranks=1, rows=5)
    assert [terms[term] for term in ("weights", "Adam", "gradients", "sum", "update")] == [
        *(400, 800, 800, 400, 400)
    ]
    each_token = 16 * 2 + 3 * 4 + 2 * 2 + 3 * models.VOCABULARY
    assert terms["activations"] == 4 * 5 * 4 * each_token
    # On three ranks four places are shared by three.
    assert memory.formula(sizes, 100, ranks=3, rows=5)["sum"] == pytest.approx(400 * 4 / 3)
    assert list(terms) == list(memory.TERMS[1:])


def test_efficiency():
    assert scaling.efficiency("weak", 2, cores=2, one_ms=10.0, many_ms=10.0) == 1.0
    assert scaling.efficiency("strong", 2, cores=2, one_ms=10.0, many_ms=5.0) == 1.0
    assert scaling.efficiency("weak", 4, cores=2, one_ms=10.0, many_ms=20.0) == 1.0  # oversubscribed
    assert scaling.efficiency("strong", 4, cores=2, one_ms=10.0, many_ms=10.0) == 0.5


@pytest.mark.parametrize(
    ("level", "seconds"), [(2.0, 10.0), (1.95, 15.0), (1.9, 20.0), (1.88, 25.0), (2.5, 10.0), (1.8, None)]
)
def test_a_loss_is_reached_on_a_line_between_evaluations(level, seconds):
    points = [[250, 10.0, 2.0], [500, 20.0, 1.9], [750, 30.0, 1.86]]
    found = nanogpt.reached_s(points, level)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_loss_that_rises_again_was_reached_the_first_time():
    assert nanogpt.reached_s([[1, 1.0, 3.0], [2, 2.0, 1.0], [3, 3.0, 2.0], [4, 4.0, 1.0]], 2.0) == 1.5
