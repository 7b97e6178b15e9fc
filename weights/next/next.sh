# In a clone of the repository with tiny6.patch applied: bash next.sh IMAGES
# vq.pt and prior.pt beside this file are finished (half precision). Left: the generator of 34 epochs, about 70 minutes
# of two cores whose instruction set has bf16 products. jemalloc: apt-get install libjemalloc2.
set -e
export OMP_NUM_THREADS=1
mkdir -p runs/tiny6
cp weights/next/{vq,prior}.pt runs/tiny6
python3 - <<'EOF'
import checkpoints
content = checkpoints.read("weights/tiny/kl.pt")  # the shipped KL tokenizer, whose 8x8 positions stay as they are
content.pop("checksum")
content["config"] = {**content["config"], "merge": 1}
checkpoints.write("runs/tiny6/kl.pt", content)
EOF
run="torchrun --nproc_per_node=2"
[ -d runs/cache6 ] || $run -- data.py --images "$1" --run runs/tiny6 --out runs/cache6 --views 6
export CPU_BF16=1 LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2
export MALLOC_CONF="dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1,thp:always,metadata_thp:always"
$run -- train.py --stage 2 --preset tiny --data runs/cache6 --run runs/tiny6 --log-every 50 --save-every 250
