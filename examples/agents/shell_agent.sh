#!/bin/sh
# An agent in the shell: curl asks, and the last line that is printed is its reward. The task is in STEPPO_TASK, as JSON.
#
#   python train.py fit --config configs/agent/quickstart.yaml --data.source.agent null \
#       --data.source.command "sh examples/agents/shell_agent.sh"

set -eu

field() { # of the JSON on the input: a path in Python
    python3 -c "import json, sys; print(json.load(sys.stdin)$1)"
}

way=$(printf %s "$STEPPO_TASK" | field '["door"]')
step=0
while [ "$step" -lt 6 ]; do
    step=$((step + 1))
    if [ "$way" -gt 0 ]; then side=east; else side=west; fi
    question="The door is ${way#-} steps to the $side. Which way?"
    answer=$(curl --silent --show-error --fail-with-body "$OPENAI_BASE_URL/chat/completions" \
        --header "Authorization: Bearer $OPENAI_API_KEY" --header "Content-Type: application/json" \
        --data "{\"model\": \"policy\", \"messages\": [{\"role\": \"user\", \"content\": \"$question\"}]}" |
        field '["choices"][0]["message"]["content"].strip().lower()[:1] < "n"')
    if [ "$answer" = True ]; then way=$((way - 1)); else way=$((way + 1)); fi
    if [ "$way" -eq 0 ]; then
        echo true
        exit 0
    fi
done
echo false
