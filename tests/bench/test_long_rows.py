from tf_dist.bench import long_rows
from tf_dist.models import transformer

P = transformer.parameter_count(65, 1024, 2, 384)


def job(ranks, step_ms, peak):
    sent, _ = long_rows.formulas(1024, ranks, P)
    return {
        "tokens": 1024, "ranks": ranks, "parameters": P, "step_ms": step_ms, "peak": peak, "sent": sent,
    }  # fmt: skip


def test_formulas():
    (alone, one), (sent, two), (_, four) = (long_rows.formulas(1024, s, P) for s in (1, 2, 4))
    assert alone == 0 and sent == 2 * 512 * 384 * 6 * 4
    assert one - two == 2 * (two - four)  # activations are halved; the rest is not
    assert 2 * two - one == 24 * P


def test_table():
    lines = long_rows.table([job(1, 200.0, 3e8), job(2, 110.0, 2e8)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:5] == ["1024", "1", "200", "1.00", "300"]
    assert lines[2].split()[3:5] == ["0.55", "200"]
