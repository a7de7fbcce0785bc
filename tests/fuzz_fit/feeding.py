"""Text of what goes into `fit`, `evaluate` and `predict`, and of the calls themselves."""

PYDATASET = """
class Batches(keras.utils.PyDataset):
    def __len__(self):
        return -(-{rows} // {batch})

    def __getitem__(self, index):
        return keras.tree.map_structure(lambda one: one[index * {batch} : (index + 1) * {batch}], {data})

"""
GENERATOR = """
def batches():
    while True:
        for start in range(0, {rows}, {batch}):
            yield keras.tree.map_structure(lambda one: one[start : start + {batch}], {data})

"""


def data(plan):
    """Examples to train and to validate on, weights, and the batches that some forms want."""
    lines = [f"x, y = examples({plan.rows})", "x_val, y_val = examples(11)", *_weights(plan)]
    if plan.form == "tensors":
        lines.append("x, y = keras.tree.map_structure(tf.convert_to_tensor, (x, y))")
    if plan.form == "frame":
        lines.append('x = pd.DataFrame(x, columns=["a", "b", "c", "d"])')
    given = _given(plan)
    slices = f"tf.data.Dataset.from_tensor_slices({_as_tuples(plan, given)})"
    if plan.form in ("dataset", "shard dataset", "repeat", "shard repeat"):
        repeat = ".repeat()" if "repeat" in plan.form else ""
        lines.append(f"batches = {slices}.batch({plan.batch}){repeat}")
    if plan.form == "shard rows":
        lines.append(f"examples_in_order = {slices}")
    fill = {"rows": plan.rows, "batch": plan.batch, "data": _as_tuples(plan, given)}
    if "pydataset" in plan.form:
        lines += PYDATASET.format(**fill).split("\n")
    if plan.form == "generator":
        lines += GENERATOR.format(**fill).split("\n")
    return lines


def _given(plan):
    return "(x, y, weight)" if _has_weight(plan) else "(x, y)"


def _has_weight(plan):
    return plan.weights in ("rows", "zeros", "own axes")


def _as_tuples(plan, given):
    """tf.data makes one tensor of a list."""
    if plan.task == "inputs":
        given = given.replace("(x,", "(tuple(x) if isinstance(x, list) else x,")
    if plan.task == "outputs" and plan.seed % 2:
        given = given.replace(" y", " tuple(y)").replace(" weight", " tuple(weight)")
    return given


def _weights(plan):
    if not _has_weight(plan):
        return []
    rows = f'numbers.uniform(0.2, 2.0, size={plan.rows}).astype("float32")'
    if plan.weights == "own axes" and plan.task == "tokens":
        return ['weight = numbers.uniform(0.2, 2.0, size=y.shape).astype("float32")']
    if plan.weights == "own axes":
        pair = f'{{"value": {rows}, "kind": {rows}}}' if plan.seed % 2 == 0 else f"[{rows}, {rows}]"
        return [f"weight = {pair}"]
    return [f"weight = {rows}", *(["weight[::3] = 0"] if plan.weights == "zeros" else [])]


def fit(plan, rng):
    """The call of `fit`, perhaps two."""
    steps = plan.rows // plan.batch
    weight = ", sample_weight=weight" if _has_weight(plan) else ""
    feed = {
        "shard arrays": [f"tf_dist.shard({_given(plan)}, comm, batch_size={plan.batch}, shuffle=False)"],
        "dataset": ["batches"],
        "shard dataset": ["tf_dist.shard(batches, comm)"],
        "shard rows": [f"tf_dist.shard(examples_in_order, comm, batch_size={plan.batch})"],
        "repeat": ["batches", f"steps_per_epoch={steps}"],
        "shard repeat": ["tf_dist.shard(batches, comm)", f"steps_per_epoch={steps}"],
        "pydataset": ["Batches()"],
        "shard pydataset": ["tf_dist.shard(Batches(), comm)"],
        "generator": ["batches()", f"steps_per_epoch={steps}"],
    }.get(plan.form, [f"x, y{weight}, batch_size={plan.batch}"])
    words = [*feed, f"epochs={plan.epochs}", "shuffle=False", "verbose=0"]
    if plan.weights == "class":
        weights = "{0: 0.5, 1: 2.0, 2: 1.2}" if plan.task != "binary" else "{0: 0.5, 1: 2.0}"
        words.append(f"class_weight={weights}")
    words += _validation(plan, rng)
    if plan.callbacks:
        words.append("callbacks=callbacks")
    call = f"model.fit({', '.join(words)})"
    return [f"history = {call}", *([f"again = {call}"] if plan.again else [])]


def _validation(plan, rng):
    pair = "(x_val, y_val)"
    slices = f"tf.data.Dataset.from_tensor_slices({_as_tuples(plan, '(x_val, y_val)').replace('isinstance(x,', 'isinstance(x_val,')}).batch(4)"
    if plan.task == "inputs":
        slices = "tf.data.Dataset.from_tensor_slices((tuple(x_val) if isinstance(x_val, list) else x_val, y_val)).batch(4)"
    if plan.task == "outputs" and plan.seed % 2:
        slices = "tf.data.Dataset.from_tensor_slices((x_val, tuple(y_val))).batch(4)"
    return {
        "": [],
        "arrays": [f"validation_data={pair}", "validation_batch_size=5"],
        "split": ["validation_split=0.25"],
        "dataset": [f"validation_data={slices}"],
        "shard": [f"validation_data=tf_dist.shard({pair}, comm, batch_size=6, training=False)"],
        "steps": [f"validation_data={slices}.repeat()", "validation_steps=2"],
        "rare": [f"validation_data={pair}", "validation_freq=2", "validation_batch_size=4"],
    }[plan.validation]


def results(plan, rng):
    """What is left of a script for the oracle."""
    feed = rng.choice(("x_val, y_val, batch_size=5", "x_val, y_val, batch_size=4", None))
    feed = feed or "tf_dist.shard((x_val, y_val), comm, batch_size=6, training=False)"
    return [
        "results = {",
        '    "history": history.history,',
        '    "weights": model.get_weights(),',
        f'    "evaluate": model.evaluate({feed}, return_dict=True, verbose=0),',
        '    "predict": model.predict(x_val, batch_size=4, verbose=0),',
        '    "iterations": int(model.optimizer.iterations),',
        "}",
        *(['results["again"] = again.history'] if plan.again else []),
    ]
