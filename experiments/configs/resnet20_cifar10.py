"""Classification: ResNet-20 on CIFAR-10, top-1 accuracy over size.

Run:      mpq run experiments/configs/resnet20_cifar10.py --model DIR --data cifar10_lossless_head.npz
Model:    DIR holds the weights of akamaster/pytorch_resnet_cifar10 as model.safetensors (sha256 067e58d1f213d012...)
          and the config.json of `mpq/models/resnet_cifar.py`.
Data:     train_x, train_y, test_x, test_y: the first 932 records of CIFAR-10's first training batch (calibration,
          selection) and of its test batch (sha256 68a5bd0ce7cf551f...).
Results:  experiments/results/resnet20_cifar10
"""

import mpq

CONFIG = mpq.RunConfig(
    name="resnet20_cifar10",
    model="resnet20_cifar10",
    data="cifar10_lossless_head.npz",
    schemes=("int2_channel", "int3_channel", "int4_channel", "int6_channel", "int8_channel", "bf16"),
    metrics=("kl", "fisher", "hessian_trace"),
    allocate_by="kl",
    budgets=("3.0bpw", "int3_channel", "3.5bpw", "int4_channel"),
    hand_out="3.5bpw",
    batch_size=64,
    calibration_windows=512,
    sensitivity_windows=(("kl", 512), ("fisher", 256), ("hessian_trace", 64)),
    selection_windows=256,
    test_windows=932,
    windows_per_document=None,
)
