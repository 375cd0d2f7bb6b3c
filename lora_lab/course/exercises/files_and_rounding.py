"""Exercises of lesson 03b: what is in an adapter's file, and why an adapter does nothing."""

import copy

import torch

from lora_lab import lora as ll
from lora_lab.course.exercise import Exercise, Reflection, close, normal
from lora_lab.inject import replace
from lora_lab.models.digits import DigitsMLP

# An adapter's file

LAYERS = ("model.layers.0.q_proj", "model.layers.1.down_proj")


def adapter_file(rng):
    """The tensors of two layers and the settings, as PEFT stores them, and the name of the second layer.

    One in four is so small, and of whole numbers, that it can be redone by hand.
    """
    small = rng.random() < 0.25
    out, inp, r = (2, 3, 2) if small else rng.permutation([3, 5, 7]).tolist()
    tensors = {}
    for layer in LAYERS:
        for part, shape in (("A", (r, inp)), ("B", (out, r))):
            values = torch.from_numpy(rng.integers(1, 4, shape)) if small else normal(rng, *shape)
            tensors[f"base_model.model.{layer}.lora_{part}.weight"] = values.to(torch.float16)
    alpha = 6 if small else int(rng.choice([16, 20, 31]))
    return tensors, {"r": r, "lora_alpha": alpha, "use_rslora": bool(rng.random() < 0.4)}, LAYERS[1]


SCALING, ROOT_IF = "config['lora_alpha'] / r * ", "config['r'] ** 0.5 if config['use_rslora'] else config['r']"
KEY = "base_model.model.{layer}.lora_{part}.weight"

update_from_file = Exercise(
    "update_from_file",
    inputs=adapter_file,
    wrong={
        "The scaling is missing. Multiply B A by lora_alpha / r.": (SCALING, ""),
        "The scaling is applied twice. Multiply B A by lora_alpha / r once.": (SCALING, f"{SCALING}{SCALING}"),
        "The update is multiplied by lora_alpha alone. Divide it by r, or by its root for rsLoRA.": (
            SCALING,
            "config['lora_alpha'] * ",
        ),
        "The scaling is upside down. It is lora_alpha / r.": ("config['lora_alpha'] / r", "r / config['lora_alpha']"),
        "Only r is under the root with rsLoRA: lora_alpha / r ** 0.5.": (
            (SCALING, "(config['lora_alpha'] / config['r']) ** (0.5 if config['use_rslora'] else 1) * ")
        ),
        "You always divide by r. Where use_rslora is True, divide by the root of r.": (ROOT_IF, "config['r']"),
        "You always divide by the root of r. Do so only where use_rslora is True.": (ROOT_IF, "config['r'] ** 0.5"),
        "You read use_rslora the wrong way round. True means the root of r.": ("if config", "if not config"),
        "The file's 16 bits are for storage. Turn A and B into float32 before you multiply them.": [
            (".float()", ""),
            (".float()", "", "(B @ A)", "B @ A"),
        ],
        "The shapes do not fit. A is (r, in) and B is (out, r), so the update of W0 is B @ A.": [
            ("B @ A", "A @ B"),
            ("B @ A", "A.T @ B"),
        ],
        "Names in the file begin with base_model.model. and then have the layer's name.": (
            "base_model.model.{layer}",
            "{layer}",
        ),
        "Names in the file end in .weight.": (".weight", ""),
        "This is the update of another layer. Put the name that you are given into the tensors' names.": (
            KEY,
            KEY.replace("{layer}", LAYERS[0]),
        ),
    },
    hints=[
        "Two tensors belong to the layer. Print tensors.keys() in the lesson to see how they are called.",
        'An f-string makes such a name: f"base_model.model.{layer}.lora_A.weight".',
        'The factor is config["lora_alpha"] divided by r, or by r ** 0.5 where config["use_rslora"] is True.',
    ],
    praise="These lines read any plain LoRA or rsLoRA file whose layers share one rank and alpha.",
)


@update_from_file.must()
def reads_the_layer_that_is_named(update_from_file, rng):
    """It is B A of the layer that is named, times a number, and has the shape of that layer's weight."""
    tensors, config, layer = adapter_file(rng)
    A, B = (tensors[KEY.format(layer=layer, part=part)].double() + 0.1 for part in "AB")
    tensors |= {KEY.format(layer=layer, part=part): each.half() for part, each in zip("AB", (A, B), strict=True)}
    update, expected = update_from_file(tensors, config, layer).double(), B.half().double() @ A.half().double()
    return close(update / update.norm(), expected / expected.norm())


@update_from_file.must()
def is_scaled_as_the_settings_say(update_from_file, rng):
    """Twice the alpha makes it twice as large, and with rsLoRA it is larger by the root of r."""
    tensors, config, layer = adapter_file(rng)
    alpha = config["lora_alpha"]
    one, two, root = (
        update_from_file(tensors, config | changes, layer)
        for changes in (
            {"use_rslora": False},
            {"use_rslora": False, "lora_alpha": 2 * alpha},
            {"use_rslora": True},
        )
    )
    return one.any() and close(two, 2 * one) and close(root, config["r"] ** 0.5 * one)


# What is wrong with an adapter

WORDS = ("no adapter", "scaling", "untrained", "merged twice", "wrong base", "none")
NONE_FOUND = "if not layers:\n        return 'no adapter'"
SILENT = "if all((layer.scaling == 0 for layer in layers.values())):\n        return 'scaling'"
ZERO_B = "if not any((layer.lora_B.any() for layer in layers.values())):\n        return 'untrained'"
IS_UPDATE = "torch.allclose(moved, update, atol=1e-06)"

find_fault = Exercise(
    "find_fault",
    hints=[
        'Collect the adapted layers first: those of model.named_modules() for which hasattr(layer, "lora_B") is true.',
        "Most faults can be read off: the scaling, B, and how far layer.base.weight is from the pre-trained weight.",
        "pretrained.get_submodule(name).weight is that weight. Compare the difference with scaling * B A by allclose.",
    ],
    praise="`ll.diagnose(model, optimizer, base=pretrained)` asks such questions too, and asks the optimiser.",
)


def patient(rng, fault="none", where=("hidden1", "hidden2")):
    """A net for digits whose adapters were trained, with a fault in the layers named; and its pre-trained net."""
    seed = int(rng.integers(2**31 - 1))
    pretrained = DigitsMLP(width=8, seed=seed)
    model = copy.deepcopy(pretrained)
    if fault == "wrong base":
        other = DigitsMLP(width=8, seed=seed + 1)
        for name in where:
            replace(model, name, other.get_submodule(name))
    for name in ("hidden1", "hidden2"):
        if fault == "no adapter":
            break
        layer = ll.LoRALinear(model.get_submodule(name), rank=2, alpha=6)
        with torch.no_grad():
            layer.lora_B.copy_(0.1 * normal(rng, *layer.lora_B.shape))
            if name in where and fault == "untrained":
                layer.lora_B.zero_()
            if name in where and fault == "merged twice":
                layer.base.weight += layer.delta()
        if name in where and fault == "scaling":
            layer.alpha = 0.0
        replace(model, name, layer)
    return model.requires_grad_(False), pretrained


def says(find_fault, rng, expected, *fault):
    """Whether it says that of a patient with this fault."""
    return find_fault(*patient(rng, *fault)) == expected


@find_fault.must(
    "The shapes do not fit. The update of a weight is layer.scaling * (layer.lora_B @ layer.lora_A), in this order.",
    ("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
)
def multiplies_in_the_right_order(find_fault, rng):
    try:
        find_fault(*patient(rng, "merged twice"))
    except RuntimeError as error:
        return "shapes cannot be multiplied" not in str(error)
    return True


@find_fault.must(
    'Return one of the words in the table, such as "untrained", and "none" where nothing is wrong.',
    ("'no adapter'", "'nothing'", "'scaling'", "'alpha'"),
    ("return 'none'", "return None"),
)
def returns_one_of_the_words(find_fault, rng):
    return all(find_fault(*patient(rng, word)) in WORDS for word in WORDS)


@find_fault.must(
    "No layer of this net has an adapter, as after a misspelt target. Return no adapter if no module has lora_B.",
    (NONE_FOUND, "pass"),
)
def sees_that_there_is_none(find_fault, rng):
    """A net without adapters is found."""
    return says(find_fault, rng, "no adapter", "no adapter")


@find_fault.must(
    "A sound adapter is called ill. The weights below it are the pre-trained ones, B is filled, and it counts.",
    ("return 'none'", "return 'wrong base'"),
    ("lora_B.any() ", "lora_B.any() is None "),
    (IS_UPDATE, "True", "moved.abs().max() > 1e-06", "True"),
)
def finds_nothing_in_a_sound_one(find_fault, rng):
    """A sound adapter has no fault."""
    return says(find_fault, rng, "none", "none")


@find_fault.must("The scaling is 0 in every layer, so that nothing is added. Look at layer.scaling.", (SILENT, "pass"))
def sees_that_it_counts_for_nothing(find_fault, rng):
    """A scaling of zero is found."""
    return says(find_fault, rng, "scaling", "scaling")


@find_fault.must(
    "B is zero in every layer, as before the first step. A tells you nothing: it is random from the start.",
    (ZERO_B, "pass"),
    ("layer.lora_B.any()", "layer.lora_A.any()"),
)
def sees_that_B_never_moved(find_fault, rng):
    """A B that was never trained is found."""
    return says(find_fault, rng, "untrained", "untrained")


@find_fault.must(
    "The adapter lies over another net's weights. Compare layer.base.weight with the pre-trained net's.",
    ("moved.abs().max() > 1e-06", "False"),
    ("return 'wrong base'", "return 'merged twice'"),
)
def sees_another_base(find_fault, rng):
    """An adapter on another base is found."""
    return says(find_fault, rng, "wrong base", "wrong base")


@find_fault.must(
    "The frozen weight already holds the update: they differ by B A times the scaling, up to rounding (allclose).",
    (IS_UPDATE, "torch.equal(moved, update)"),
    ("layer.scaling * (", "("),
)
def sees_what_was_merged_before(find_fault, rng):
    """An update that was merged and is added again is found."""
    return says(find_fault, rng, "merged twice", "merged twice")


@find_fault.must(
    "One layer alone can be merged, or on another base. Look at each layer, not at the first or the last.",
    ("in layers.items()", "in list(layers.items())[:1]"),
    ("in layers.items()", "in list(layers.items())[-1:]"),
)
def looks_at_each_layer(find_fault, rng):
    """Such a fault is found in one layer alone, too."""
    faults = [(word, [name]) for word in ("merged twice", "wrong base") for name in ("hidden1", "hidden2")]
    return all(says(find_fault, rng, word, word, where) for word, where in faults)


@find_fault.must(
    "B is zero in one layer alone: this works. Untrained means zero in all, and merged twice that the weight moved.",
    ("not any((layer.lora_B.any()", "not all((layer.lora_B.any()"),
    ("if moved.any() and ", "if "),
)
def lets_one_layer_rest(find_fault, rng):
    """An adapter with B at zero in one layer alone has no fault."""
    return all(says(find_fault, rng, "none", "untrained", [name]) for name in ("hidden1", "hidden2"))


@find_fault.must(
    "A scaling of 0 in one layer is no fault as long as another layer counts. Ask whether all are 0.",
    ("if all((layer.scaling", "if any((layer.scaling"),
)
def lets_one_layer_be_switched_off(find_fault, rng):
    """An adapter that is switched off in one layer alone has no fault."""
    return all(says(find_fault, rng, "none", "scaling", [name]) for name in ("hidden1", "hidden2"))


Reflection(
    "03b_files_and_rounding",
    question="A colleague sends you an adapter's folder: it works on their machine, and on yours the model speaks as "
    "it did before, or nonsense. Describe in five to eight sentences what you would look at, in which order. Then: "
    "when would you merge the adapter, and when would you keep it apart?",
    rubric=(
        "The base is compared, not only the shapes, and the answer says how.",
        "It says how to see that the adapter was loaded at all, such as by B or by the names of layers.",
        "It names something that can be read off the file or its settings.",
        "It gives a reason to merge and a reason to keep the adapter apart.",
    ),
    expected="First the settings: which base does adapter_config.json name, and is it the one here, also after an "
    "update? Then the layers: which were adapted, is B filled there, is the scaling what the file says? Compare a "
    "layer's output with the adapter and without it, and the base's own answers on both machines. A merge suits one "
    "adapter that is shipped: nothing is added to the cost of inference. Kept apart, it can be switched off without "
    "a trace, replaced, or mixed with others; a merged update cannot be subtracted exactly.",
)
