"""After keras.io's "Knowledge Distillation".

Compute_loss mixes the student's loss with that between two sets of predictions.
"""

import tf_dist

comm = tf_dist.connect()

import keras
import numpy as np
from keras import layers, ops

keras.utils.set_random_seed(21)


class Distiller(keras.Model):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def compile(self, optimizer, metrics, student_loss_fn, distillation_loss_fn, alpha=0.1, temperature=3):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn, self.distillation_loss_fn = student_loss_fn, distillation_loss_fn
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
        taught = self.teacher(x, training=False)
        soft = [ops.softmax(one / self.temperature, axis=1) for one in (taught, y_pred)]
        distilled = self.distillation_loss_fn(*soft) * self.temperature**2
        return self.alpha * self.student_loss_fn(y, y_pred) + (1 - self.alpha) * distilled

    def call(self, x):
        return self.student(x)


def network(width):
    return keras.Sequential([keras.Input((6,)), layers.Dense(width, activation="tanh"), layers.Dense(3)])


numbers = np.random.default_rng(21)
x, y = numbers.normal(size=(29, 6)).astype("float32"), numbers.integers(3, size=29)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
accuracy = keras.metrics.SparseCategoricalAccuracy
teacher, student = network(12), network(4)
teacher.compile(
    tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm), loss, metrics=[accuracy()]
)
taught = teacher.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
distiller = Distiller(student, teacher)
distiller.compile(
    tf_dist.distribute(keras.optimizers.Adam(0.01, epsilon=1e-3), comm),
    metrics=[accuracy()],
    student_loss_fn=loss,
    distillation_loss_fn=keras.losses.KLDivergence(),
)
history = distiller.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
results = {
    "taught": taught.history,
    "history": history.history,
    "weights": distiller.get_weights(),
    "evaluate": distiller.evaluate(x, y, verbose=0),
}
