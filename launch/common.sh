# shellcheck shell=bash
# What the scripts of this folder share. Works with the bash 3.2 of macOS.

# The comment that opens a script is its help.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  printf '\nDRY_RUN=1 prints the commands instead of running them.\n'
}

fail() { echo "${0##*/}: $1" >&2; exit 2; }

# Refuse to go on while one of these variables is unset or empty.
need() {
  local variable
  for variable in "$@"; do
    [ -n "${!variable:-}" ] || fail "set $variable; see ${0##*/} --help"
  done
}

# One line that a shell can run.
show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Run a command; with DRY_RUN=1 print it instead.
run() { if [ -n "${DRY_RUN:-}" ]; then show "$@"; else "$@"; fi; }

# The checkout, as the last commit has it: what the hosts install. The archive lasts as long as the script.
archive=c2f_source.tar.gz
pack() {
  if [ -z "${DRY_RUN:-}" ]; then
    archive=$(mktemp -d)/$archive
    trap 'rm -r "$(dirname "$archive")"' EXIT
  fi
  run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
}

# For a shell on a TPU host. The images bring Python 3.10, c2f_jax needs a later one: uv installs it.
ON_HOST_INSTALL='set -e
rm -rf c2f_source; mkdir c2f_source; tar -xzf c2f_source.tar.gz -C c2f_source
command -v pip3 >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq install python3-pip; }
PIP_BREAK_SYSTEM_PACKAGES=1 pip3 install --quiet --user uv
python3 -m uv venv --quiet --clear --python 3.12 c2f
python3 -m uv pip install --quiet --python c2f/bin/python "./c2f_source[train,tpu]"
c2f/bin/c2f --help >/dev/null && echo "$(hostname): c2f is installed"'

# It goes on when the connection ends.
on_host_train() {
  local arguments
  printf -v arguments ' %q' "$@"
  cat <<EOF
if kill -0 "\$(cat c2f.pid 2>/dev/null)" 2>/dev/null; then echo "\$(hostname): training already" >&2; exit 1; fi
nohup bash c2f_source/launch/supervise.sh c2f/bin/c2f train --distributed$arguments >>c2f.log 2>&1 </dev/null &
echo \$! >c2f.pid
EOF
}

ON_HOST_WATCH='tail -n 40 -F c2f.log'

# SIGTERM saves a checkpoint; wait until it is written.
ON_HOST_STOP='pid=$(cat c2f.pid 2>/dev/null) && kill "$pid" 2>/dev/null || { echo "$(hostname): nothing runs"; exit 0; }
while kill -0 "$pid" 2>/dev/null; do sleep 1; done
tail -n 1 c2f.log'
