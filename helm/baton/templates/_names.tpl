{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if .Values.nameOverride -}}
{{- printf "%s-%s" .Release.Name .Values.nameOverride -}}
{{- else -}}
{{- .Release.Name -}}
{{- end -}}
{{- end -}}

{{- define "baton.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: baton
{{- end -}}

{{/* For objects of the chart itself. Pods of Ray don't get app.kubernetes.io/name: the operator's head Service selects by it. */}}
{{- define "baton.labels" -}}
{{ include "baton.selectorLabels" . }}
app.kubernetes.io/name: baton
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") | quote }}
{{- end -}}

{{- define "baton.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "baton.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "baton.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Name of the claim that holds runs; empty where they lie in an object store. */}}
{{- define "baton.claimName" -}}
{{- with .Values.storage.persistentVolumeClaim -}}
{{- if .existingClaim -}}
{{- .existingClaim -}}
{{- else if .create -}}
{{- include "baton.fullname" $ }}-storage
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.script" -}}
{{ .Values.image.codePath }}/launch/finetune.py
{{- end -}}

{{/* Labels by which queues find the job. They go on the RayJob, and the operator copies them to its RayClusters. */}}
{{- define "baton.queueLabels" -}}
{{- $queue := .Values.queue -}}
{{- if eq $queue.kind "kueue" -}}
kueue.x-k8s.io/queue-name: {{ $queue.name | quote }}
{{- with $queue.priorityClass }}
kueue.x-k8s.io/priority-class: {{ . | quote }}
{{- end }}
{{- else if eq $queue.kind "volcano" -}}
volcano.sh/queue-name: {{ $queue.name | quote }}
{{- with $queue.priorityClass }}
ray.io/priority-class-name: {{ . | quote }}
{{- end }}
{{- else if eq $queue.kind "yunikorn" -}}
yunikorn.apache.org/queue: {{ $queue.name | quote }}
yunikorn.apache.org/app-id: {{ include "baton.fullname" . | quote }}
ray.io/gang-scheduling-enabled: "true"
{{- end -}}
{{- end -}}
