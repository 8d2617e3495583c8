{{/*
What no schema can say: rules that KubeRay checks only after `kubectl apply` (ray-operator/controllers/ray/utils/
validation.go of 1.7.0), and what would make a run that can't start or can't resume. Included by rayjob.yaml.
*/}}
{{- define "baton.rules" -}}
{{- include "baton.rules.name" . -}}
{{- include "baton.rules.job" . -}}
{{- include "baton.rules.storage" . -}}
{{- include "baton.rules.auth" . -}}
{{- include "baton.rules.queue" . -}}
{{- include "baton.rules.workers" . -}}
{{- include "baton.rules.metrics" . -}}
{{- end -}}

{{- define "baton.rules.name" -}}
{{- $name := include "baton.fullname" . -}}
{{- if gt (len $name) 47 -}}
{{- fail (printf "fullnameOverride: the name %q has %d characters; KubeRay takes 47 at most. Choose a shorter release name or set fullnameOverride" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "fullnameOverride: the name %q must begin with a letter and hold only a-z, 0-9 and -; KubeRay refuses the rest" $name) -}}
{{- end -}}
{{- end -}}

{{- define "baton.rules.job" -}}
{{- $job := .Values.job -}}
{{- if and $job.suspend (not $job.shutdownAfterJobFinishes) -}}
{{- fail "job.suspend=true needs job.shutdownAfterJobFinishes=true: KubeRay suspends by deleting the RayCluster" -}}
{{- end -}}
{{- if and (gt (int $job.ttlSecondsAfterFinished) 0) (not $job.shutdownAfterJobFinishes) -}}
{{- fail (printf "job.ttlSecondsAfterFinished=%d needs job.shutdownAfterJobFinishes=true; set one or make the other 0" (int $job.ttlSecondsAfterFinished)) -}}
{{- end -}}
{{- if and $job.deletionRules $job.shutdownAfterJobFinishes -}}
{{- fail "job.deletionRules and job.shutdownAfterJobFinishes=true exclude each other; set job.shutdownAfterJobFinishes=false and job.ttlSecondsAfterFinished=0" -}}
{{- end -}}
{{- $seen := dict -}}
{{- range $index, $rule := $job.deletionRules -}}
{{- $key := printf "%s/%s" $rule.condition.jobStatus $rule.policy -}}
{{- if hasKey $seen $key -}}
{{- fail (printf "job.deletionRules[%d]: a second rule for jobStatus %s and policy %s" $index $rule.condition.jobStatus $rule.policy) -}}
{{- end -}}
{{- $_ := set $seen $key (int ($rule.condition.ttlSeconds | default 0)) -}}
{{- end -}}
{{- range $status := list "SUCCEEDED" "FAILED" -}}
{{- $before := 0 -}}
{{- range $policy := list "DeleteWorkers" "DeleteCluster" "DeleteSelf" -}}
{{- $key := printf "%s/%s" $status $policy -}}
{{- if hasKey $seen $key -}}
{{- if lt (get $seen $key) $before -}}
{{- fail (printf "job.deletionRules: for %s, %s after %d s comes before what it includes (%d s); ttlSeconds must not fall from DeleteWorkers to DeleteCluster to DeleteSelf" $status $policy (get $seen $key) $before) -}}
{{- end -}}
{{- $before = get $seen $key -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Paths that outlive the pods, as JSON: the claim's and those of extraVolumes that are no emptyDir. */}}
{{- define "baton.lastingPaths" -}}
{{- $paths := list -}}
{{- if include "baton.claimName" . -}}{{- $paths = append $paths .Values.storage.persistentVolumeClaim.mountPath -}}{{- end -}}
{{- $passing := list -}}
{{- range .Values.extraVolumes -}}{{- if hasKey . "emptyDir" -}}{{- $passing = append $passing .name -}}{{- end -}}{{- end -}}
{{- range .Values.extraVolumeMounts -}}
{{- if and (not (has .name $passing)) (not .readOnly) -}}{{- $paths = append $paths .mountPath -}}{{- end -}}
{{- end -}}
{{- toJson $paths -}}
{{- end -}}

{{- define "baton.rules.storage" -}}
{{- $claim := .Values.storage.persistentVolumeClaim -}}
{{- $given := (.Values.config.run | default dict).storage | default "" -}}
{{- if and $claim.existingClaim $claim.create -}}
{{- fail "storage.persistentVolumeClaim: give existingClaim or create=true, not both" -}}
{{- end -}}
{{- if and $given .Values.storage.uri (ne $given .Values.storage.uri) -}}
{{- fail (printf "config.run.storage=%q, but storage.uri=%q; give one of them" $given .Values.storage.uri) -}}
{{- end -}}
{{- if not (or .Values.storage.uri (include "baton.claimName" .) $given) -}}
{{- fail "storage: give storage.uri (s3://…, gs://…), storage.persistentVolumeClaim.existingClaim or storage.persistentVolumeClaim.create=true. Every retry is a new RayCluster (job.backoffLimit), so checkpoints inside the pods would be lost and the run would start over" -}}
{{- end -}}
{{- if and $given (not (regexMatch "^(s3|gs)://" $given)) -}}
{{- $lasts := false -}}
{{- range $path := include "baton.lastingPaths" . | fromJsonArray -}}
{{- if hasPrefix (printf "%s/" $path) (printf "%s/" $given) -}}{{- $lasts = true -}}{{- end -}}
{{- end -}}
{{- if not $lasts -}}
{{- fail (printf "config.run.storage=%q would be lost with the pod: it is under none of the mounted paths %s. Leave it out, and give storage.uri or storage.persistentVolumeClaim" $given (include "baton.lastingPaths" .)) -}}
{{- end -}}
{{- end -}}
{{- if and $claim.create (not (has "ReadWriteMany" $claim.accessModes)) -}}
{{- fail (printf "storage.persistentVolumeClaim.accessModes=%s: head and workers are different pods, on different nodes as a rule; ReadWriteMany is needed" (toJson $claim.accessModes)) -}}
{{- end -}}
{{- end -}}

{{- define "baton.rules.auth" -}}
{{- if and (eq .Values.auth.mode "token") (not (semverCompare ">=2.52.0-0" .Values.rayVersion)) -}}
{{- fail (printf "auth.mode=token needs Ray 2.52 or newer, and rayVersion=%s" .Values.rayVersion) -}}
{{- end -}}
{{- if and (eq .Values.auth.mode "disabled") (not .Values.networkPolicy.enabled) -}}
{{- fail "auth.mode=disabled with networkPolicy.enabled=false: anybody in the cluster could run code through Ray's dashboard (CVE-2023-48022). Keep one of the two" -}}
{{- end -}}
{{- if and (eq .Values.auth.mode "disabled") .Values.auth.existingSecret -}}
{{- fail "auth.existingSecret is read only with auth.mode=token" -}}
{{- end -}}
{{- end -}}

{{- define "baton.rules.queue" -}}
{{- if and (ne .Values.queue.kind "none") (not .Values.queue.name) -}}
{{- fail (printf "queue.name is required with queue.kind=%s" .Values.queue.kind) -}}
{{- end -}}
{{- if and (eq .Values.queue.kind "none") (or .Values.queue.name .Values.queue.priorityClass) -}}
{{- fail "queue.name and queue.priorityClass are read only with queue.kind=kueue, volcano or yunikorn" -}}
{{- end -}}
{{- if and (eq .Values.queue.kind "yunikorn") .Values.queue.priorityClass -}}
{{- fail "queue.priorityClass is not read with queue.kind=yunikorn; set head.priorityClassName and worker.priorityClassName" -}}
{{- end -}}
{{- if and (eq .Values.queue.kind "kueue") (not .Values.job.shutdownAfterJobFinishes) -}}
{{- fail "queue.kind=kueue needs job.shutdownAfterJobFinishes=true: Kueue suspends and resumes the job" -}}
{{- end -}}
{{- end -}}

{{- define "baton.rules.workers" -}}
{{- $worker := .Values.worker -}}
{{- $cluster := .Values.config.cluster | default dict -}}
{{- $launcher := $cluster.launcher | default "ray" -}}
{{- if ne $launcher "ray" -}}
{{- fail (printf "config.cluster.launcher=%s trains in the head pod alone; leave it out" $launcher) -}}
{{- end -}}
{{- $wanted := int (include "baton.numWorkers" .) -}}
{{- if and (hasKey $cluster "num_workers") (ne (int $cluster.num_workers) $wanted) -}}
{{- fail (printf "config.cluster.num_workers=%d, but worker.replicas × processes per pod is %d × %s = %d; leave config.cluster.num_workers out" (int $cluster.num_workers) (int $worker.replicas) (include "baton.processesPerPod" .) $wanted) -}}
{{- end -}}
{{- $bounds := $cluster.workers | default dict -}}
{{- if and (hasKey $bounds "max") (ne (int $bounds.max) $wanted) -}}
{{- fail (printf "config.cluster.workers.max=%d, but worker.replicas × processes per pod is %d × %s = %d; give that as max" (int $bounds.max) (int $worker.replicas) (include "baton.processesPerPod" .) $wanted) -}}
{{- end -}}
{{- if not (has $cluster.use_gpu (list nil (gt (int $worker.gpusPerPod) 0))) -}}
{{- fail (printf "config.cluster.use_gpu=%v, but worker.gpusPerPod=%d; leave config.cluster.use_gpu out" $cluster.use_gpu (int $worker.gpusPerPod)) -}}
{{- end -}}
{{- if and $cluster.gpus_per_node (gt (int $worker.gpusPerPod) 0) (ne (int $cluster.gpus_per_node) (int $worker.gpusPerPod)) -}}
{{- fail (printf "config.cluster.gpus_per_node=%d, but worker.gpusPerPod=%d; leave config.cluster.gpus_per_node out" (int $cluster.gpus_per_node) (int $worker.gpusPerPod)) -}}
{{- end -}}
{{- range $place := list "requests" "limits" -}}
{{- if hasKey (get $worker.resources $place | default dict) $worker.gpuResourceName -}}
{{- fail (printf "worker.resources.%s holds %s; give GPUs as worker.gpusPerPod" $place $worker.gpuResourceName) -}}
{{- end -}}
{{- end -}}
{{- $limits := $worker.resources.limits -}}
{{- $needed := mulf (float64 ($cluster.cpus_per_worker | default 1)) (float64 (include "baton.processesPerPod" .)) 1000.0 | ceil | int64 -}}
{{- $cpus := div (add (int64 (include "baton.millicpu" $limits.cpu)) 999) 1000 -}}
{{- if gt $needed (mul $cpus 1000) -}}
{{- fail (printf "worker.resources.limits.cpu=%v gives a pod %d CPU slots, but its %s processes ask for %v each (config.cluster.cpus_per_worker), so they could never be placed" $limits.cpu $cpus (include "baton.processesPerPod" .) ($cluster.cpus_per_worker | default 1)) -}}
{{- end -}}
{{- if gt (int64 (include "baton.mebibytes" $worker.shmSize)) (int64 (include "baton.mebibytes" $limits.memory)) -}}
{{- fail (printf "worker.shmSize=%s is more than worker.resources.limits.memory=%s, towards which it counts" $worker.shmSize $limits.memory) -}}
{{- end -}}
{{- end -}}

{{- define "baton.rules.metrics" -}}
{{- $port := int (include "baton.metricsPort" .) -}}
{{- if or (and (gt $port 0) (lt $port 1024)) (has $port (list 6379 8080 8265 10001)) -}}
{{- fail (printf "config.metrics.port=%d can't be bound in the head pod: below 1024 needs root, and 6379, 8080, 8265 and 10001 are Ray's" $port) -}}
{{- end -}}
{{- range $file, $enabled := dict "files/alerts.yaml" .Values.monitoring.prometheusRule.enabled "files/dashboard.json" .Values.monitoring.dashboard.enabled -}}
{{- if and $enabled (not ($.Files.Get $file)) -}}
{{- fail (printf "%s is missing from this copy of the chart" $file) -}}
{{- end -}}
{{- end -}}
{{- end -}}
