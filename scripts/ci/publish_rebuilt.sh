#!/usr/bin/env bash
# Puts what `nf4 rebuild --output FOLDER` wrote on a branch that holds nothing else, as one commit.
#
#   publish_rebuilt.sh FOLDER BRANCH
#
# GITHUB_TOKEN, if set, is what the push is made with; it is in no argument and in no file.
set -euo pipefail
results=$(cd -- "$1" && pwd)
branch=$2
test -f "$results/results.json" || { echo "Error: $results holds no results.json." >&2; exit 1; }

origin=$(git remote get-url origin)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
git init --quiet "$work"
cd "$work"
git config user.name "nf4 rebuild"
git config user.email "nf4-rebuild@users.noreply.github.com"
git remote add origin "$origin"
if [ -n "${GITHUB_TOKEN:-}" ]; then
# shellcheck disable=SC2016 # git runs it, and the variable is read there
  git config credential.helper \
    '!f() { echo username=x-access-token; echo "password=$GITHUB_TOKEN"; }; f'
fi
if git fetch --quiet --depth 1 origin "refs/heads/$branch" 2>/dev/null; then
  git checkout --quiet -B "$branch" FETCH_HEAD
else
  git checkout --quiet --orphan "$branch"
fi
# The results of artifacts that are no longer listed go, too: nobody vouches for them today.
git rm --quiet -r --ignore-unmatch . >/dev/null
cp -R -- "$results/." .
git add --all
if git diff --cached --quiet; then
  echo "Nothing changed."
  exit 0
fi
git commit --quiet --message "Rebuilt: $(sed -n '3s/ artifacts:.*//p' README.md) artifacts"
git push --quiet origin "HEAD:refs/heads/$branch"
echo "Published on the branch $branch."
