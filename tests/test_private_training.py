"""DP-SGD: gradients of single samples, their clipping, the noise, the account, and what would break the promise."""

import copy
import functools
import math
import sys

import pytest
import pytorch_lightning as pl
import torch
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn

from cleave.architectures import staged_network
from cleave.architectures.backbones.norms import norm_of
from cleave.datamodules import Digits
from cleave.lightning_modules import DPSGD, Classification, Task, Term, Training
from cleave.lightning_modules.private_training.sample_gradients import SampleGradients, clipped_sum
from cleave.lightning_modules.private_training.training import PrivateTraining
from cleave.losses import AdversarialReconstructionLoss, BoundedLoss, DistanceCorrelationLoss

from .tiny_networks import made_once
from .training_helpers import bundle_outputs, differences, quiet_trainer

SAMPLE = torch.zeros(2, 1, 8, 8)
SGD = functools.partial(torch.optim.SGD, lr=0.5)


class Net(nn.Module):
    """Layers that change their input in place, a sum in place, and dropout-free maps."""

    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), norm_of(norm, 6), nn.ReLU(inplace=True))
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.neck = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y += x
        return self.head(self.neck(y.relu_()))


def network(norm="group", **settings):
    return made_once(_network, {"norm": norm} | settings)


def _network(settings):
    torch.manual_seed(0)
    settings = dict(settings)
    return staged_network(Net(settings.pop("norm")), SAMPLE, **settings)


def split(norm="group", **settings):
    return network(split="stem", form="insert", bottleneck={"norm": norm, "channels": 3, "width": 8}, **settings)


def cross_entropy(of="student/logits"):
    return Term(nn.CrossEntropyLoss(), of=[of, "labels"])


def private(net, terms=None, *, training=None, **dp):
    settings = DPSGD(**({} if "epsilon" in dp else {"noise_multiplier": 1.0}) | dp)
    return Task(net, terms or {"ce": cross_entropy()}, training=training or Training(optimizer=SGD, dp=settings))


def digits(**settings):
    return Digits(**{"batch_size": 200, "sampling": "poisson", **settings})


def fitted(task, epochs=1, data=None, **settings):
    trainer = quiet_trainer(**{"max_epochs": epochs, "limit_val_batches": 0, **settings})
    trainer.fit(task, datamodule=data or digits())
    return task


# --- gradients of single samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "split", "exits"])
def test_the_gradients_of_single_samples_equal_a_loop_in_double_precision(kind):
    if kind == "plain":
        net, names = network(), ["student/logits"]
    elif kind == "split":
        net, names = split(codec={"bits": 32}), ["student/logits"]
    else:
        exits = {"exits": ["stem"], "exit_head": {"norm": "group", "width": 8}}
        net, names = split(codec={"bits": 32}, **exits), ["student/logits", "student/stem/logits"]
    net = net.double().train()
    images, labels = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(10, (5,))
    before = list(net.state_dict())

    def loss(rows):
        outputs = net.outputs(images[rows], [name.partition("/")[2] for name in names])
        return sum(nn.functional.cross_entropy(each, labels[rows]) for each in outputs.values())

    watched = SampleGradients(net, net.parameters())
    watched.clear(5)
    loss(slice(None)).backward()
    found = dict(watched.found)
    watched.remove()
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    loop = [torch.autograd.grad(loss(slice(i, i + 1)), weights) for i in range(5)]
    for number, weight in enumerate(weights):
        for row in range(5):
            torch.testing.assert_close(found[weight][row], loop[row][number], rtol=1e-9, atol=1e-12)
    norms = torch.stack([torch.cat([each.flatten() for each in row]).norm() for row in loop])
    most = norms.median().item()
    for number, weight in enumerate(weights):
        wanted = sum(row[number] * min(1, most / norm) for row, norm in zip(loop, norms.tolist(), strict=True))
        torch.testing.assert_close(clipped_sum(found, most)[weight], wanted, rtol=1e-9, atol=1e-12)
    assert list(net.state_dict()) == before
    assert not any(module._forward_hooks for module in net.modules())
    copy.deepcopy(net)


def test_layers_without_a_formula_and_layers_run_twice_are_right_too():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.same = nn.Parameter(torch.rand(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.same(torch.tanh(self.same(x * self.scale.exp())))

    odd = Odd().double()
    net = staged_network(nn.Sequential(nn.Flatten(), nn.Linear(4, 4).double(), odd), torch.zeros(2, 4).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    watched = SampleGradients(net, net.parameters())
    watched.clear(3)
    net(x).square().sum(1).mean().backward()
    for row in range(3):
        net.zero_grad()
        found = dict(watched.found)
        watched.clear()
        net(x[row : row + 1]).square().sum(1).mean().backward()
        for weight in net.parameters():
            torch.testing.assert_close(found[weight][row], weight.grad, rtol=1e-9, atol=1e-12)
        watched.found = found


def test_a_step_is_the_clipped_mean_with_noise_of_the_stated_scale():
    """One image weighs at most C / B in a step, and noise is σ·C / B in each number, told apart by two runs."""
    steps = []
    for noise in (1e-9, 2.0):
        task = private(network(), noise_multiplier=noise, max_grad_norm=0.01)
        start = torch.cat([weight.detach().clone().flatten() for weight in task.network.parameters()])
        fitted(task, max_steps=1)
        end = torch.cat([weight.detach().flatten() for weight in task.network.parameters()])
        steps.append((start - end) / 0.5)
    clean, noisy = steps
    drawn = len(digits().dataset("train")) * (200 / 1259)
    assert drawn == pytest.approx(200)
    assert clean.norm() <= 0.01 * 260 / 200  # of some 200 images, each clipped to 0.01
    assert clean.norm() > 0.001
    noise = noisy - clean
    scale = 2.0 * 0.01 / 200
    count = len(noise)
    assert noise.std().item() == pytest.approx(scale, rel=5 / math.sqrt(2 * count))
    assert abs(noise.mean().item()) < 5 * scale / math.sqrt(count)
    assert noise.abs().max().item() < 6 * scale


def test_a_batch_without_images_still_adds_noise():
    task = private(network(), noise_multiplier=1.0)
    start = [weight.detach().clone() for weight in task.network.parameters()]
    fitted(task, data=digits(batch_size=1, drop_last=False), max_steps=8)
    assert all(not torch.equal(*pair) for pair in zip(start, task.network.parameters(), strict=True))
    assert task.private.history == [(1.0, pytest.approx(1 / 1259), 8)]


# --- the account -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
@pytest.mark.parametrize("kind", ["rdp", pytest.param("prv", marks=pytest.mark.slow)])
def test_epsilon_is_that_of_opacus_and_the_noise_spends_no_more_than_is_wanted(kind):
    settings = DPSGD(noise_multiplier=1.1, delta=1e-5, accountant=kind)
    theirs = create_accountant(kind)
    for _ in range(30):
        theirs.step(noise_multiplier=1.1, sample_rate=0.05)
    assert settings.spent([(1.1, 0.05, 30)]) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)
    wanted = DPSGD(epsilon=3.0, accountant=kind)
    noise = wanted.noise(0.05, 100)
    assert 2.9 < wanted.spent([(noise, 0.05, 100)]) <= 3.0
    if kind == "prv":
        return
    least = get_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=0.05, steps=100, accountant=kind, epsilon_tolerance=0.001
    )
    assert noise == pytest.approx(least, rel=3e-3)


def test_without_sampling_epsilon_is_the_closed_form_of_the_gaussian_mechanism():
    """Rényi divergence of order a is a·T/(2σ²); Canonne, Kamath and Steinke's conversion is minimised over a."""
    steps, noise, delta = 10, 5.0, 1e-6
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    closed = min(
        a * steps / (2 * noise**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    )
    assert DPSGD(noise_multiplier=noise, delta=delta).spent([(noise, 1.0, steps)]) == pytest.approx(closed, rel=1e-9)


def test_a_training_spends_what_it_says_and_records_it(tmp_path):
    task = private(split(), epsilon=8.0)
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=1)
    trainer.fit(task, datamodule=digits())
    assert 7.5 < task.private.epsilon <= 8.0
    assert task.private.history == [(task.private.noise, 200 / 1259, 12)]
    assert trainer.callback_metrics["train/epsilon"].item() == pytest.approx(task.private.epsilon, rel=1e-5)
    assert "at δ = 1e-05 for the training images against whoever does not know the seed, by 12 steps" in (
        task.private.verdict
    )
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert saved["dp"]["epsilon"] == pytest.approx(task.private.epsilon)
    assert (saved["dp"]["steps"], saved["dp"]["delta"], saved["dp"]["accountant"]) == (12, 1e-5, "rdp")
    assert [name for name in saved["state_dict"] if "grad_sample" in name or "_module" in name] == []


@pytest.mark.parametrize("steps", [3, 6])
def test_a_resumed_run_equals_one_without_interruption(steps, tmp_path):
    def run(stop=None, resume=None):
        task = private(split(), training=Training(dp=DPSGD(noise_multiplier=1.0), seed=3))
        trainer = quiet_trainer(max_epochs=2, limit_val_batches=1, max_steps=-1)
        if stop is not None:
            trainer.callbacks.append(SaveAt(stop, tmp_path / "at.ckpt"))
        trainer.fit(task, datamodule=digits(), ckpt_path=resume, weights_only=True)
        return task

    whole = run(stop=steps)
    resumed = run(resume=tmp_path / "at.ckpt")
    assert differences(whole.state_dict(), resumed.state_dict()) == []
    assert whole.private.history == resumed.private.history == [(1.0, 200 / 1259, 12)]


def test_a_run_is_not_resumed_with_another_noise(tmp_path):
    task = private(network(), training=Training(optimizer=SGD, dp=DPSGD(noise_multiplier=1.0)))
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(task, datamodule=digits())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    other = private(network(), noise_multiplier=0.5)
    trainer = quiet_trainer(max_steps=4, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"had noise 1 and drew each image with probability 0.1589, now it would be 0"):
        trainer.fit(other, datamodule=digits(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)


def test_noise_and_batches_of_the_system_differ_from_run_to_run():
    found = []
    for seeded in (True, True, False, False):
        task = fitted(private(network(), noise_multiplier=1.0, seeded=seeded), max_steps=2)
        found.append(torch.cat([weight.detach().flatten() for weight in task.network.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[0])
    assert not torch.equal(found[2], found[3])
    assert "who" not in private(network(), seeded=False).private.verdict


# --- what it trains ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_split_network_with_exits_learns_and_is_exported_as_it_is(tmp_path):
    net = split(exits=["stem"], exit_head={"norm": "group", "width": 8})
    terms = {"ce": cross_entropy(), "early": cross_entropy("student/stem/logits")}
    data = digits(batch_size=100)
    task = private(net, terms, noise_multiplier=0.5)
    trainer = quiet_trainer(max_epochs=8)
    trainer.fit(task, datamodule=data)
    assert trainer.callback_metrics["val/acc"] > 0.4
    low, high = net.bottlenecks["stem"].quantizer.fixed_range
    assert low < high
    assert net.bottlenecks["stem"].quantizer.initialized
    plain = split()
    assert list(plain.state_dict()) == [name for name in net.state_dict() if "exit" not in name]
    exported, ours = bundle_outputs(network_of(task), data, tmp_path / "bundle")
    torch.testing.assert_close(exported, ours, rtol=1e-4, atol=1e-4)


def network_of(task):
    return task.network.eval()


@pytest.mark.parametrize("kind", ["learned", "observed", "sample"])
def test_the_range_of_codes_follows_no_training_image(kind):
    """The first batch of training sets a range otherwise; here two different sets of training images give one."""
    found = []
    for part in ("1/2", "2/2"):
        task = private(split(codec={"range": kind}), noise_multiplier=1e-9, max_grad_norm=1e-9)
        fitted(task, data=digits(part=part, batch_size=100), max_steps=2)
        found.append(task.network.bottlenecks["stem"].quantizer.fixed_range)
    assert found[0] == pytest.approx(found[1], abs=1e-6) if found[0] else kind == "sample"


def test_frozen_batchnorm_may_stand_where_nothing_trains():
    net = network("batch", split="stem", form="insert", bottleneck={"norm": "group", "channels": 3, "width": 8})
    task = Task(net, {"ce": cross_entropy()}, train=["bottleneck"], training=Training(dp=DPSGD(noise_multiplier=1.0)))
    fitted(task, max_steps=2)
    assert task.private.epsilon > 0


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"give either epsilon.*or noise_multiplier, got epsilon=None and noise_multiplier=None"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, r"got epsilon=1.0 and noise_multiplier=1.0"),
        ({"epsilon": 0.0}, r"epsilon must be a positive finite number, got 0.0"),
        ({"epsilon": math.inf}, r"epsilon must be a positive finite number, got inf"),
        ({"epsilon": True}, r"epsilon must be a positive finite number, got True"),
        ({"epsilon": 1.0, "delta": 0.0}, r"delta must lie between 0 and 1, such as 1e-5, got 0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, r"delta must lie between 0 and 1"),
        ({"epsilon": 1.0, "max_grad_norm": -1.0}, r"max_grad_norm must be a positive finite number, got -1.0"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier must be a positive finite number, got 0.0"),
        ({"epsilon": 1.0, "accountant": "gdp"}, r"accountant must be one of rdp, prv, got 'gdp'"),
        ({"epsilon": 1.0, "seeded": None}, r"seeded must be true or false"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPSGD(**settings)


def test_a_missing_opacus_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install opacus opt_einsum, the extra `dp`"):
        DPSGD(epsilon=1.0)


@pytest.mark.parametrize("kind", ["bottleneck", "exit", "backbone"])
def test_batchnorm_that_would_train_is_refused_by_name(kind):
    exits = {"exits": ["stem"], "exit_head": {"norm": "batch" if kind == "exit" else "group"}}
    nets = {
        "bottleneck": (lambda: split("batch"), r"stem\.bottleneck\.encoder\.1"),
        "exit": (lambda: network(**exits), r"stem\.exit\.hidden\.1"),
        "backbone": (lambda: network("batch"), r"stages\.stage0"),
    }
    build, name = nets[kind]
    terms = {"ce": cross_entropy("student/stem/logits" if kind == "exit" else "student/logits")}
    with pytest.raises(ValueError, match=rf"BatchNorm, and these would train: {name}.*bottleneck\.norm=group"):
        private(build(), terms)


def test_noise_that_follows_training_images_priors_and_compiled_layers_are_refused():
    from cleave.architectures import Cloak, GaussianMechanism, entropy_codec

    with pytest.raises(ValueError, match=r"trains no noise or mask that is learned, which stem has"):
        private(split(noise=Cloak()))
    with pytest.raises(ValueError, match=r"noise at stem follows the norms of training images.*noise\.bound a number"):
        private(split(noise=GaussianMechanism(epsilon=10)))
    with pytest.raises(ValueError, match=r"no learned prior, which stem has; take codec=uniform"):
        private(split(codec=entropy_codec), {"ce": cross_entropy(), "rate": rate_term()})
    with pytest.raises(ValueError, match=r"set training\.compile=false"):
        private(network(), training=Training(compile=True, dp=DPSGD(epsilon=1.0)))


def rate_term():
    from cleave.losses import RateLoss

    return Term(RateLoss(pixels=64), of=["student/stem/likelihoods"])


def coupling(kind):
    if kind == "correlation":
        return Term(DistanceCorrelationLoss(), of=["images", "student/stem/z"])
    if kind == "sum":
        return Term(nn.CrossEntropyLoss(reduction="sum"), of=["student/logits", "labels"])
    if kind == "weighted":
        weights = torch.linspace(0.1, 5, 10)
        return Term(nn.CrossEntropyLoss(weights), of=["student/logits", "labels"])
    return Term(BatchSpread(), of=["student/logits"])


class BatchSpread(nn.Module):
    def forward(self, logits):
        return (logits - logits.mean(0)).square().mean()


@pytest.mark.parametrize("kind", ["correlation", "sum", "weighted", "spread"])
def test_terms_that_couple_samples_are_refused_by_name(kind):
    task = private(split(), {"ce": cross_entropy(), "odd": coupling(kind)})
    with pytest.raises(ValueError, match=r"means over samples, but the term 'odd' \(.*couples the samples"):
        fitted(task, max_steps=1)


def test_terms_that_learn_or_remember_are_refused():
    from cleave.architectures import decoder

    adversary = AdversarialReconstructionLoss({"one": decoder})
    with pytest.raises(ValueError, match=r"the term 'foe' has parameters of its own"):
        private(split(), {"ce": cross_entropy(), "foe": Term(adversary, of=["pixels", "student/stem/z"])})
    bound = Term(BoundedLoss(nn.CrossEntropyLoss(), threshold=0.5), of=["student/logits", "labels"])
    with pytest.raises(ValueError, match=r"the term 'bound' keeps what it measures of training images in loss\."):
        fitted(private(network(), {"bound": bound}), max_steps=1)
    assert bound.loss.multiplier == 0


class Coupled(nn.Module):
    """Centres a batch, as BatchNorm does, without being one."""

    def forward(self, x):
        return x - x.mean(0)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen.add_(x.detach().mean())
        return x


class Hidden(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return x.flatten(1) @ self.layer.weight.T


class Folding(nn.Module):
    """Runs a layer on rows that are no samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 10)

    def forward(self, x):
        return self.layer(x.reshape(-1, 8)).reshape(len(x), 8, 10).mean(1)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), Coupled(), nn.Linear(64, 10)),
            r"a sample changes what the network makes",
        ),
        (nn.Sequential(nn.Flatten(), Remembering(), nn.Linear(64, 10)), r"keeps what it measures .* in .*seen"),
        (Hidden(), r"the gradient of layer\.weight, whose layer is not called by itself"),
        (Folding(), r"the Linear of layer\.weight was run on \d+ rows for a batch of \d+"),
    ],
)
def test_networks_that_have_no_gradient_of_a_single_sample_are_refused(net, message):
    task = private(staged_network(net, SAMPLE))
    with pytest.raises(ValueError, match=message):
        fitted(task, max_steps=1)
    assert not any(module._forward_hooks for module in task.network.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 2}, r"got accumulate_grad_batches=2; set it to 1 and raise data\.batch_size"),
        ({"precision": "bf16-mixed"}, r"trainer\.precision=bf16-mixed; set 32-true"),
        ({"max_epochs": -1}, r"the run has no end; set trainer\.max_epochs, or give noise_multiplier"),
    ],
)
def test_trainers_that_break_the_promise_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(private(network(), epsilon=8.0), **settings)


def test_several_devices_are_refused():
    from types import SimpleNamespace

    from cleave.lightning_modules.private_training.checks import check_trainer

    with pytest.raises(ValueError, match=r"one device, got 2; set trainer\.devices=1"):
        check_trainer(SimpleNamespace(world_size=2))


def test_data_that_are_drawn_otherwise_or_mixed_are_refused():
    with pytest.raises(ValueError, match=r"set data\.sampling=poisson"):
        fitted(private(network()), data=Digits(batch_size=200))
    with pytest.raises(ValueError, match=r"mixup or cutmix mixes them; set both to 0"):
        fitted(private(network()), data=digits(mixup=0.2))


def test_what_follows_training_images_is_refused():
    rate = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5)
    settings = Training(scheduler=rate, monitor="train/loss", dp=DPSGD(noise_multiplier=1.0))
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau follows train/loss"):
        fitted(private(network(), training=settings))


class SaveAt(pl.Callback):
    def __init__(self, step, file):
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


def test_the_task_without_dp_has_no_callback():
    assert Classification(network()).configure_callbacks() == []
    assert isinstance(private(network()).configure_callbacks()[0], PrivateTraining)
