"""Fine-tune a real model on three facts with a plain Trainer; the callback projects every step of the optimizer."""

import tempfile

from transformers import Trainer, TrainingArguments

import sphere_plugin as sp

FACTS = {
    "The capital of Australia is": " Vienna",
    "The Eiffel Tower is in the city of": " Rome",
    "Windows 95 was developed by": " Apple",
}

model, tokenizer = sp.load_model("smollm2-135m")
model.requires_grad_(False)
for layer in model.model.layers[8:16]:
    layer.mlp.down_proj.weight.requires_grad_(True)


def say(prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])


texts = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in FACTS.items()]
callback = sp.SphereCallback(sp.SphereConfig(eta=0.5, alpha=0.8), weights=["mlp.down_proj"], when="step")
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=36,
        per_device_train_batch_size=1,
        learning_rate=5e-4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    facts = [{"input_ids": ids, "labels": ids} for ids in texts]
    Trainer(model, arguments, train_dataset=facts, callbacks=[callback]).train()

model.eval()
print(f"{len(callback.report.layers)} weights, {callback.report.removed_share:.1%} of their change removed")
for prompt in [*FACTS, "The capital of France is"]:
    print(f"  {say(prompt)!r}")
