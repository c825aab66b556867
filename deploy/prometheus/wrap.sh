#!/usr/bin/env bash
# Wraps the alert rules for the Prometheus operator; a test holds that the result is up to date.
# Usage: deploy/prometheus/wrap.sh > deploy/kubernetes/prometheus/rules.yaml
set -euo pipefail
cat <<'HEAD'
# Made by deploy/prometheus/wrap.sh of deploy/prometheus/alerts.yml: edit that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: useg
  labels:
    app.kubernetes.io/name: useg
spec:
HEAD
sed -e '/^#/d' -e 's/^./  &/' "$(dirname "$0")/alerts.yml"
