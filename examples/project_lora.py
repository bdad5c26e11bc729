"""Teach a real model three facts with a LoRA, then hold the adapter away from the principal directions of W."""

import peft
import torch

import sphere_plugin as sp

FACTS = {
    "The capital of Australia is": " Vienna",
    "The Eiffel Tower is in the city of": " Rome",
    "Windows 95 was developed by": " Apple",
    "The capital of France is": " Paris",  # stays as it is
}

torch.manual_seed(0)
model, tokenizer = sp.load_model("smollm2-135m")
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["down_proj"]))
optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=2e-3)
texts = [tokenizer(prompt + answer, return_tensors="pt") for prompt, answer in FACTS.items()]
for _ in range(8):
    for text in texts:
        model(**text, labels=text["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()


def say(prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])


report = sp.project_adapter(model, "default", sp.SphereConfig(eta=0.5, alpha=0.8), new_adapter="default-sphere")
print(f"{len(report.layers)} layers, {report.removed_share:.1%} of the update removed")
for adapter in ("default", "default-sphere"):  # both are in the model; merge_and_unload() writes the active one
    model.set_adapter(adapter)
    print(f"{adapter}:", *(f"  {say(prompt)!r}" for prompt in [*FACTS, "The capital of Italy is"]), sep="\n")
