"""Every stock Keras callback, and our own, over real ranks: in Keras's `fit` and in our Trainer.

In `fit` each rank has data of its own, of another size; the optimizer averages gradients.
Keras is imported inside functions: ``connected`` comes first, as in a user's script.
"""

import http.server
import json
import os
import sys
import threading
import types

import numpy as np
import pytest

from tf_dist.errors import LaunchError, NumericError, UsageError

# Whether a rank is the first, or another one, is all that callbacks know of ranks.
pytestmark = pytest.mark.ranks(2)

V, T, G, STRETCH = 11, 8, 8, 3
TOKENS = np.resize(np.arange(V, dtype=np.uint16), 1201)
EPOCHS, BATCHES = 3, 2


@pytest.fixture
def folder(everyone, tmp_path_factory):
    """One folder for all ranks."""
    path = tmp_path_factory.mktemp("callbacks")
    return type(path)(everyone(str(path))[0])


def rows_of(rank):
    return np.random.default_rng(rank).normal(size=(BATCHES * (2 + rank), 3)).astype(np.float32)


def target(x):
    return (x.sum(axis=1, keepdims=True) > 0).astype(np.float32)


def compiled(wrap=lambda optimizer: optimizer, rate=0.1, **more):
    """A small Keras model, run eagerly: nothing is traced."""
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation="sigmoid")])
    optimizer = wrap(keras.optimizers.SGD(rate, **more))
    model.compile(optimizer, "mse", metrics=["mae", keras.metrics.AUC(name="auc")], run_eagerly=True)
    return model


def distributed(comm, **more):
    import tf_dist

    return compiled(lambda optimizer: tf_dist.distribute(optimizer, comm), **more)


def fit_keras(comm, callbacks, epochs=EPOCHS, verbose=0, **more):
    model = distributed(comm, **more)
    x = rows_of(comm.rank)
    model.fit(
        of_this_rank(comm, x, target(x)), epochs=epochs, verbose=verbose,
        validation_data=of_this_rank(comm, x + 1, target(x), 99), callbacks=callbacks,
    )  # fmt: skip
    return model


def of_this_rank(comm, x, y, batch_size=None):
    """Rows that this rank brings by itself, in batches of another size than those of the others."""
    import tensorflow as tf

    import tf_dist

    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size or 2 + comm.rank)
    return tf_dist.shard(batches, comm, sharded=True)


def fit_ours(comm, callbacks, epochs=EPOCHS, rate=0.1, update="allreduce", **more):
    import keras

    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T,), dtype="int32"), keras.layers.Embedding(V, V)])
    optimizer = keras.optimizers.SGD(rate, **more)
    trainer = Trainer(
        model, optimizer, comm, update, clip_norm=0.0, global_batch_size=G, micro_batch_size=2, seq_len=T
    )
    trainer.fit(
        TOKENS, steps=STRETCH * epochs, validation=TOKENS[:99], eval_every=STRETCH, callbacks=callbacks
    )
    return model


FITS = {"fit": fit_keras, "Trainer": fit_ours}


@pytest.fixture(params=FITS)
def fit(request):
    return FITS[request.param]


def flat(model):
    return np.concatenate([np.asarray(variable.value).ravel() for variable in model.weights]).tolist()


def same(everyone, value):
    return everyone(value) == [value] * len(everyone(value))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_stock_callbacks_that_write_leave_one_set_of_files(connected, everyone, folder, fit, capsys):
    """Once, on rank 0, and there for every rank when training returns."""
    import keras

    k = keras.callbacks
    (folder / "backup").mkdir(exist_ok=True)
    seen = []
    capsys.readouterr()
    model = fit(
        connected,
        [
            k.ModelCheckpoint(folder / "{epoch:02d}-{val_loss:.3f}.weights.h5", save_weights_only=True),
            k.ModelCheckpoint(folder / "best.keras", save_best_only=True),
            k.ModelCheckpoint(folder / "batch.weights.h5", save_weights_only=True, save_freq=2),
            k.CSVLogger(folder / "log.csv"),
            k.BackupAndRestore(folder / "backup"),
            k.ProgbarLogger(),
            k.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(sorted(logs))),
        ],
    )
    # `fit_keras` is told not to be verbose, and Keras's bar obeys.
    drawn = connected.rank == 0 and fit is fit_ours
    assert capsys.readouterr().out.count(f"Epoch {EPOCHS}/{EPOCHS}\n") == drawn
    assert same(everyone, files(folder))
    found = files(folder)
    assert len([name for name in found if name.endswith(".weights.h5")]) == EPOCHS + 1, found
    assert {"best.keras", "log.csv", "batch.weights.h5"} <= set(found)
    lines = (folder / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + EPOCHS
    assert same(everyone, seen) and len(seen) == EPOCHS and "val_loss" in seen[0]
    assert same(everyone, model.history.history)
    assert same(everyone, flat(model))


def test_checkpoints_of_whole_models_are_plain_keras(connected, everyone, folder, fit):
    """They load where nobody has heard of us, with the weights of their time, and the optimizer's state."""
    import keras

    kept, checkpoint = [], keras.callbacks.ModelCheckpoint

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept.append(flat(self.model))

    model = fit(
        connected,
        [
            checkpoint(folder / "best.keras", save_best_only=True, save_freq="epoch"),
            checkpoint(folder / "worst.keras", "loss", save_best_only=True, mode="max"),
            checkpoint(folder / "batch.keras", save_freq=2),
            Keep(),
        ],
        momentum=0.9,
    )
    assert same(everyone, files(folder))
    history, epoch = model.history.history, len(kept) // EPOCHS
    best, worst = np.argmin(history["val_loss"]) + 1, np.argmax(history["loss"]) + 1
    after = {"best": best * epoch, "worst": worst * epoch, "batch": len(kept) // 2 * 2}
    for name, step in after.items():
        loaded = keras.saving.load_model(folder / f"{name}.keras")
        assert flat(loaded) == kept[step - 1], name
        if fit is fit_keras:  # the Trainer's models are not compiled: their files hold no optimizer
            assert type(loaded.optimizer) is keras.optimizers.SGD
            assert int(loaded.optimizer.iterations) == step


def events(path):
    """What TensorBoard finds in the one event file of a folder: arrays by tag and step."""
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(path))
    reader.Reload()
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto) for event in reader.Tensors(tag)}
        for tag in reader.Tags()["tensors"]
    }


def test_tensorboard(connected, everyone, folder, fit):
    """One file of events for each kind, by rank 0, and in them the logs of all ranks."""
    import keras

    keras.backend.clear_session()  # names in the files are rank 0's: let all ranks count layers alike

    board = keras.callbacks.TensorBoard(folder, histogram_freq=1, update_freq=1, write_steps_per_second=True)
    model = fit(connected, [board])
    found = files(folder)
    assert same(everyone, found)
    assert [name.split("/")[0] for name in found] == ["train", "validation"], found
    assert all(f".{os.getpid()}." in name for name in found) == (connected.rank == 0)
    history = model.history.history
    train, validation = events(folder / "train"), events(folder / "validation")
    assert [float(v) for v in train["epoch_loss"].values()] == pytest.approx(history["loss"], rel=1e-6)
    assert [float(v) for v in validation["epoch_loss"].values()] == pytest.approx(
        history["val_loss"], rel=1e-6
    )
    steps = int(model.optimizer.iterations)
    assert len(train["batch_loss"]) == len(train["batch_steps_per_second"]) == steps
    assert len(validation["evaluation_loss_vs_iterations"]) == EPOCHS
    (graph,) = train["keras"].values()
    assert json.loads(graph.item())["class_name"] == "Sequential"
    for weight in model.weights:
        histograms = train[f"{weight.path}/histogram"]
        assert sorted(histograms) == list(range(EPOCHS))
        assert histograms[EPOCHS - 1][:, 2].sum() == np.size(weight)


def test_remote_monitor(connected, everyone, fit):
    """Only rank 0 calls, and it says what all ranks know."""
    import keras

    pytest.importorskip("requests")
    posts = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        root = f"http://127.0.0.1:{server.server_address[1]}"
        model = fit(connected, [keras.callbacks.RemoteMonitor(root, send_as_json=True)])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert everyone(len(posts)) == [EPOCHS] + [0] * (connected.size - 1)
    if connected.rank == 0:
        assert [post["val_loss"] for post in posts] == model.history.history["val_loss"]


def test_stock_callbacks_that_decide_decide_alike(connected, everyone, fit):
    import keras

    k = keras.callbacks
    stopping = k.EarlyStopping("loss", mode="max", patience=2, restore_best_weights=True)
    plateau = k.ReduceLROnPlateau("loss", mode="max", factor=0.5, patience=1)
    scheduler = k.LearningRateScheduler(lambda epoch, rate: rate * (0.9 if epoch else 1.0))
    model = fit(connected, [scheduler, plateau, stopping, k.TerminateOnNaN()], epochs=9)
    history = model.history.history
    assert same(everyone, history) and same(everyone, stopping.stopped_epoch) and same(everyone, flat(model))
    assert len(history["loss"]) == 3 and stopping.stopped_epoch == 2
    assert same(everyone, float(model.optimizer.learning_rate))
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1 * 0.9**2 * 0.5**2)


def test_swap_ema_weights(connected, everyone, fit):
    """Validation sees the averaged weights, training goes on with its own, on every rank."""
    import keras

    swapped = fit(connected, [keras.callbacks.SwapEMAWeights()], use_ema=True, ema_momentum=0.5)
    plain = fit(connected, [], use_ema=True, ema_momentum=0.5)
    mine, theirs = swapped.history.history, plain.history.history
    assert same(everyone, mine) and same(everyone, flat(swapped))
    # Swapping is arithmetic in place (a + b - b), so it costs last bits.
    np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
    assert abs(mine["val_loss"][0] - theirs["val_loss"][0]) > 1e-5


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swap_ema_weights_that_only_rank_0_has(connected, everyone, swap_on_epoch):
    import keras

    histories, found = [], []
    for update in ("allreduce", "master"):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        model = fit_ours(connected, [swap], update=update, use_ema=True, ema_momentum=0.5)
        histories.append(model.history.history)
        found.append(flat(model))
    assert same(everyone, histories) and same(everyone, found)
    assert histories[0] == histories[1] and found[0] == found[1]


def test_terminate_on_nan(connected, everyone):
    """In `fit` one rank's NaN stops all at that batch; the Trainer raises before a callback could see it."""
    import keras

    batches = []
    model = distributed(connected)
    x = rows_of(connected.rank)
    y = target(x)
    if connected.rank == connected.size - 1:
        y[:] = np.nan
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    callbacks = [keras.callbacks.TerminateOnNaN(), count]
    model.fit(of_this_rank(connected, x, y), epochs=4, verbose=0, callbacks=callbacks)
    assert everyone(batches) == [[0]] * connected.size
    with pytest.raises(NumericError):
        fit_ours(connected, [keras.callbacks.TerminateOnNaN()], rate=float("inf"))


def test_backup_and_restore_goes_on_everywhere(connected, everyone, folder, fit):
    """Rank 0 alone reads the backup; all ranks go on from its epoch, as if nothing had happened."""
    import keras

    def backup():
        return keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)

    epochs = []
    whole = fit(connected, [], epochs=4, momentum=0.9)
    fit(connected, [backup()], epochs=2, momentum=0.9)
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    resumed = fit(connected, [backup(), note], epochs=4, momentum=0.9)
    assert everyone(epochs) == [[2, 3]] * connected.size
    assert same(everyone, flat(resumed))
    assert flat(resumed) == flat(whole)
    assert [v.numpy().tolist() for v in resumed.optimizer.variables] == [
        v.numpy().tolist() for v in whole.optimizer.variables
    ]


def test_one_rank_wants_to_stop_and_changes_its_rate(connected, everyone, fit):
    import keras

    batches, rates = [], []
    last = connected.size - 1

    class Wish(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 0.01 * (1 + connected.rank)

        def on_train_batch_end(self, batch, logs=None):
            batches.append(batch)
            rates.append(float(self.model.optimizer.learning_rate))
            if len(batches) == 2 and connected.rank == last:
                self.model.stop_training = True

    model = fit(connected, [Wish()], epochs=9)
    assert same(everyone, batches)
    # Our Trainer's wish travels with the reduction of the next step.
    assert len(batches) == (2 if fit is fit_keras else 3)
    assert same(everyone, flat(model))
    assert rates == [pytest.approx(0.01)] * len(rates)


def test_a_wish_between_hooks_waits_for_the_end_of_the_epoch(connected, everyone):
    """No callback looks at batches, so nothing is agreed there: a rank must not leave alone."""
    import keras

    model = distributed(connected)
    x = rows_of(connected.rank)
    train_step = model.train_step

    def wishing(data):
        if connected.rank == connected.size - 1:
            model.stop_training = True
        return train_step(data)

    model.train_step = wishing
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None)
    history = model.fit(of_this_rank(connected, x, target(x)), epochs=5, verbose=0, callbacks=[count])
    assert everyone(len(history.epoch)) == [1] * connected.size
    # One rank has nobody to wait for: it stops where plain Keras does.
    taken = BATCHES if connected.size > 1 else 1
    assert everyone(int(model.optimizer.iterations)) == [taken] * connected.size


def test_logs_are_those_of_all_samples(connected, everyone):
    """Ranks bring batches of different sizes; the logs are what one process says of all rows."""
    import keras

    model = fit_keras(connected, [], epochs=1, rate=0.0)
    found = {name: values[0] for name, values in model.history.history.items()}
    assert same(everyone, found)
    x = np.concatenate([rows_of(rank) for rank in range(connected.size)])
    alone = keras.callbacks.CallbackList([])  # without a model: Keras's own, of this rank
    trained = model.evaluate(x, target(x), 99, verbose=0, callbacks=alone, return_dict=True)
    held_out = model.evaluate(x + 1, target(x), 99, verbose=0, callbacks=alone, return_dict=True)
    expected = trained | {f"val_{name}": value for name, value in held_out.items()}
    assert found == pytest.approx(expected, rel=1e-5)
    mine = rows_of(connected.rank)
    data = of_this_rank(connected, mine, target(mine))
    together = model.evaluate(data, verbose=0, return_dict=True)
    assert together == pytest.approx(trained, rel=1e-5)


def test_average_metrics_by_hand(connected, everyone):
    """Without `distribute`, and the callback in the list."""
    import tf_dist
    from tf_dist import callbacks

    model = compiled(rate=0.0)
    x = rows_of(connected.rank)
    data = {"batch_size": 2 + connected.rank, "verbose": 0, "validation_data": (x + 1, target(x))}
    with tf_dist.independent():
        history = model.fit(x, target(x), callbacks=[callbacks.AverageMetrics(connected)], **data).history
    assert same(everyone, history)
    reference = fit_keras(connected, [], epochs=1, rate=0.0).history.history
    assert history == {name: pytest.approx(values, rel=1e-6) for name, values in reference.items()}


def test_foreign_callbacks_write_on_rank_0(connected, everyone, fit, monkeypatch):
    """W&B's and MLflow's own, recognised by module, through subclasses, and `rank_zero_only` either way."""
    import keras

    ran = []

    def callback(name, module, **attributes):
        def on_epoch_end(self, epoch, logs=None):
            ran.append(name)

        body = {"on_epoch_end": on_epoch_end, "__module__": module, **attributes}
        return type(name, (keras.callbacks.Callback,), body)

    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    wandb = sys.modules["wandb"].Wandb = callback("Wandb", "wandb.integration.keras")

    class Mine(wandb):
        pass

    class Everywhere(wandb):
        rank_zero_only = False

        def on_epoch_end(self, epoch, logs=None):
            ran.append("Everywhere")

    kinds = [callback("Mlflow", "mlflow.tensorflow.callback"), Mine, Everywhere]
    kinds.append(callback("Plain", "tests", rank_zero_only=True))
    fit(connected, [kind() for kind in kinds], epochs=1)
    others = [["Everywhere"]] * (connected.size - 1)
    assert everyone(ran) == [["Mlflow", "Wandb", "Everywhere", "Plain"], *others]


def test_our_own_callbacks(connected, everyone, fit):
    import tf_dist

    c = tf_dist.callbacks
    warmup = c.LearningRateWarmup(connected, steps=4)
    model = fit(
        connected,
        [
            c.BroadcastWeights(connected), c.AverageMetrics(connected), warmup,
            c.SyncCheck(connected, every=2),
            c.Throughput(connected, tokens_per_sample=T, every=2),
        ],
    )  # fmt: skip
    history = model.history.history
    assert same(everyone, history)
    assert all(value > 0 for value in history["samples_per_s"])
    assert history["tokens_per_s"] == pytest.approx([T * value for value in history["samples_per_s"]])
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1 * connected.size)


def test_warmup_refuses_a_schedule(connected, fit):
    import keras

    from tf_dist import callbacks

    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    with pytest.raises(UsageError, match="schedule"):
        fit(connected, [callbacks.LearningRateWarmup(connected, steps=3)], rate=schedule)


@pytest.mark.parametrize("where", ["weight", "momentum"])
def test_sync_check_names_the_rank_that_drifts(connected, everyone, where):
    import keras

    from tf_dist import callbacks

    last = connected.size - 1

    class Drift(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            optimizer = self.model.optimizer
            variable = self.model.weights[1] if where == "weight" else optimizer.variables[-1]
            if connected.rank == last and int(optimizer.iterations) == 5:
                variable.assign(variable + 1e-6)  # `fit` itself looks after steps 4 and 8

    try:
        fit_keras(connected, [Drift(), callbacks.SyncCheck(connected, every=2)], epochs=4, momentum=0.9)
        outcome = "equal"
    except LaunchError as error:
        outcome = str(error)
    assert same(everyone, outcome)
    if connected.size == 1:
        assert outcome == "equal"
        return
    who = f"rank {last} differs from ranks 0, 1" if last > 1 else "rank 0 and rank 1 differ"
    assert f"after batch 6 {who}" in outcome
    assert where in outcome or "bias" in outcome


def test_broadcast_weights(connected, everyone):
    from tf_dist import callbacks

    model = distributed(connected, momentum=0.9)
    model.optimizer.build(model.trainable_variables)
    for variable in [*model.weights, *model.optimizer.variables]:
        variable.assign(variable + connected.rank)
    broadcast = callbacks.BroadcastWeights(connected)
    broadcast.set_model(model)
    broadcast.on_train_begin()
    assert same(
        everyone, [np.asarray(v.value).tolist() for v in [*model.weights, *model.optimizer.variables]]
    )
    assert int(model.optimizer.iterations) == 0
