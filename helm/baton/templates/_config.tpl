{{/* Worker processes of one worker pod. */}}
{{- define "baton.processesPerPod" -}}
{{- if gt (int .Values.worker.gpusPerPod) 0 -}}
{{- int .Values.worker.gpusPerPod -}}
{{- else -}}
{{- int .Values.worker.cpuProcessesPerPod -}}
{{- end -}}
{{- end -}}

{{- define "baton.numWorkers" -}}
{{- mul (int .Values.worker.replicas) (int (include "baton.processesPerPod" .)) -}}
{{- end -}}

{{- define "baton.runStorage" -}}
{{- if .Values.storage.uri -}}
{{- .Values.storage.uri -}}
{{- else -}}
{{- .Values.storage.persistentVolumeClaim.mountPath }}/runs
{{- end -}}
{{- end -}}

{{/* Port of Baton's own metrics, on the head pod; 0: none. */}}
{{- define "baton.metricsPort" -}}
{{- $metrics := .Values.config.metrics | default dict -}}
{{- hasKey $metrics "port" | ternary $metrics.port 9464 | int -}}
{{- end -}}

{{/*
The run's configuration: values.config, with what the chart knows filled in. As JSON, which is YAML too: Helm's YAML
would write 50000000 as 5e+07, and that is no integer any more.
*/}}
{{- define "baton.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $run := merge (dict) ($config.run | default dict) -}}
{{- if not $run.name -}}{{- $_ := set $run "name" (include "baton.fullname" .) -}}{{- end -}}
{{- if not $run.storage -}}{{- $_ := set $run "storage" (include "baton.runStorage" .) -}}{{- end -}}
{{- $_ := set $config "run" $run -}}
{{- $cluster := merge (dict) ($config.cluster | default dict) -}}
{{- if not (hasKey $cluster "num_workers") -}}{{- $_ := set $cluster "num_workers" (int (include "baton.numWorkers" .)) -}}{{- end -}}
{{- if kindIs "invalid" $cluster.use_gpu -}}{{- $_ := set $cluster "use_gpu" (gt (int .Values.worker.gpusPerPod) 0) -}}{{- end -}}
{{- if and (gt (int .Values.worker.gpusPerPod) 0) (kindIs "invalid" $cluster.gpus_per_node) -}}{{- $_ := set $cluster "gpus_per_node" (int .Values.worker.gpusPerPod) -}}{{- end -}}
{{- $_ := set $config "cluster" $cluster -}}
{{- $metrics := merge (dict "port" (int (include "baton.metricsPort" .))) ($config.metrics | default dict) -}}
{{- $_ := set $config "metrics" $metrics -}}
{{- $config | toPrettyJson -}}
{{- end -}}
