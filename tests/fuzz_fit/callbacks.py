"""Text of callbacks, and of what they have left behind when `fit` is over."""

RECORDER = """
class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append([float(logs[name]) for name in sorted(logs)])

"""
TEXTS = {
    "EarlyStopping": 'keras.callbacks.EarlyStopping("{monitor}", mode="min", patience=0, min_delta=0.05, restore_best_weights={restore})',
    "ReduceLROnPlateau": 'keras.callbacks.ReduceLROnPlateau("{monitor}", mode="min", factor=0.5, patience=1, min_delta=0.5)',
    "LearningRateScheduler": "keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7)",
    "ModelCheckpoint": 'keras.callbacks.ModelCheckpoint("saved.weights.h5", monitor="{monitor}", mode="min", save_best_only={restore}, save_weights_only=True)',
    "LambdaCallback": 'keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(float(logs["loss"])))',
    "CSVLogger": 'keras.callbacks.CSVLogger("log.csv")',
    "TerminateOnNaN": "keras.callbacks.TerminateOnNaN()",
    "own": "recorder",
}


def lines(plan, rng):
    """Makes the list ``callbacks``."""
    if not plan.callbacks:
        return []
    validated = plan.validation not in ("", "rare")
    fill = {
        "monitor": "val_loss" if validated and rng.random() < 0.5 else "loss",
        "restore": rng.random() < 0.5,
    }
    made = [TEXTS[name].format(**fill) for name in plan.callbacks]
    return [
        *([*RECORDER.split("\n"), "recorder = Recorder()"] if "own" in plan.callbacks else []),
        "losses = []",
        "callbacks = [",
        *(f"    {text}," for text in made),
        "]",
    ]


def results(plan):
    """What they have seen, and written."""
    found = []
    if "own" in plan.callbacks:
        found.append('results["recorded"] = recorder.seen')
    if "LambdaCallback" in plan.callbacks:
        found.append('results["losses"] = losses')
    if "CSVLogger" in plan.callbacks:
        found.append('results["csv"] = pd.read_csv("log.csv").to_numpy()')
    if "ModelCheckpoint" in plan.callbacks:
        found += ['model.load_weights("saved.weights.h5")', 'results["saved"] = model.get_weights()']
    return found
