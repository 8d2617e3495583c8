{{/* What a preStop or a drain gets: saving and a margin. */}}
{{- define "baton.graceSeconds" -}}
{{- add (int .Values.termination.saveSeconds) (int .Values.termination.marginSeconds) -}}
{{- end -}}

{{/* Pod settings that head, workers, submitter and test share. */}}
{{- define "baton.podBasics" -}}
serviceAccountName: {{ include "baton.serviceAccountName" . | quote }}
automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where pods may go. Argument: values of head or worker. */}}
{{- define "baton.placement" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $ $key }}
{{ $key }}:
{{- if kindIs "string" . }} {{ . | quote }}{{ else }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Environment that does not differ between pods. */}}
{{- define "baton.env" -}}
- {name: RAY_AUTH_MODE, value: {{ .Values.auth.mode | quote }}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: PYTHONUNBUFFERED, value: "1"}
- {name: HF_HOME, value: /cache/huggingface}
{{- if .Values.huggingFace.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- with .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . | quote }}, key: {{ $.Values.huggingFace.tokenKey | quote }}}
{{- end }}
{{- end -}}

{{- define "baton.envFrom" -}}
{{- with .Values.storage.existingSecret }}
envFrom:
  - secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "baton.volumeMounts" -}}
- {name: cache, mountPath: /cache}
{{- if include "baton.claimName" . }}
- {name: storage, mountPath: {{ .Values.storage.persistentVolumeClaim.mountPath | quote }}}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.volumes" -}}
- name: cache
  emptyDir: {sizeLimit: {{ .Values.huggingFace.cacheSize | quote }}}
{{- with include "baton.claimName" . }}
- name: storage
  persistentVolumeClaim: {claimName: {{ . | quote }}}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.configVolume" -}}
- name: config
  configMap: {name: {{ printf "%s-config" (include "baton.fullname" .) | quote }}}
{{- end -}}

{{- define "baton.headTemplate" -}}
{{- $head := .Values.head -}}
metadata:
  labels:
    {{- include "baton.selectorLabels" . | nindent 4 }}
    app.kubernetes.io/component: head
    {{- with $head.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $head.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "baton.podBasics" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "baton.graceSeconds" . }}
  {{- with include "baton.placement" $head | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ include "baton.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      # All of them: once one port is named, the operator's Service has only those that are.
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: metrics, containerPort: 8080}
        {{- if ne (include "baton.metricsPort" .) "0" }}
        - {name: baton-metrics, containerPort: {{ include "baton.metricsPort" . }}}
        {{- end }}
      resources:
        {{- toYaml $head.resources | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      env:
        {{- include "baton.env" . | nindent 8 }}
        # `ray job stop` and the operator's finalizer: how long the driver may take to save before it is killed.
        - {name: RAY_JOB_STOP_WAIT_TIME_S, value: {{ .Values.termination.saveSeconds | int64 | toString | quote }}}
        # preStop has waited for the driver already.
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "5"}
        {{- with $head.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with include "baton.envFrom" . | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [bash, /etc/baton/stop-driver.sh, {{ .Values.termination.saveSeconds | int64 | toString | quote }}, {{ include "baton.script" . | quote }}]
      volumeMounts:
        - {name: config, mountPath: /etc/baton, readOnly: true}
        {{- include "baton.volumeMounts" . | nindent 8 }}
  volumes:
    {{- include "baton.configVolume" . | nindent 4 }}
    {{- include "baton.volumes" . | nindent 4 }}
{{- end -}}

{{- define "baton.workerTemplate" -}}
{{- $worker := .Values.worker -}}
{{- $extra := deepCopy $worker.rdma.resources -}}
{{- if gt (int $worker.gpusPerPod) 0 -}}{{- $_ := set $extra $worker.gpuResourceName (int $worker.gpusPerPod) -}}{{- end -}}
{{- $resources := dict "requests" (merge (dict) $extra $worker.resources.requests) "limits" (merge (dict) $extra $worker.resources.limits) -}}
{{- $security := deepCopy .Values.securityContext -}}
{{- if $worker.rdma.ipcLock -}}
{{- $capabilities := $security.capabilities | default dict -}}
{{- $_ := set $security "capabilities" (set $capabilities "add" (append ($capabilities.add | default list) "IPC_LOCK")) -}}
{{- end -}}
metadata:
  labels:
    {{- include "baton.selectorLabels" . | nindent 4 }}
    app.kubernetes.io/component: worker
    {{- with $worker.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $worker.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "baton.podBasics" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "baton.graceSeconds" . }}
  {{- with include "baton.placement" $worker | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ include "baton.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      ports:
        - {name: metrics, containerPort: 8080}
      resources:
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- toYaml $security | nindent 8 }}
      env:
        {{- include "baton.env" . | nindent 8 }}
        # `ray start --block` is the container's first process: on SIGTERM it announces that the node goes, and keeps it
        # up for this long, or until its workers have ended.
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ .Values.termination.saveSeconds | int64 | toString | quote }}}
        {{- with $worker.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with include "baton.envFrom" . | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        {{- include "baton.volumeMounts" . | nindent 8 }}
  volumes:
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $worker.shmSize | quote }}}
    {{- include "baton.volumes" . | nindent 4 }}
{{- end -}}

{{/* K8sJobMode: the operator's own submitter pod would not pass the restricted standard. It fills in the command. */}}
{{- define "baton.submitterTemplate" -}}
metadata:
  labels:
    {{- include "baton.selectorLabels" . | nindent 4 }}
    app.kubernetes.io/component: submitter
spec:
  {{- include "baton.podBasics" . | nindent 2 }}
  restartPolicy: Never
  containers:
    - name: ray-job-submitter
      image: {{ include "baton.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      resources:
        {{- toYaml .Values.job.submitter.resources | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      env:
        - {name: RAY_AUTH_MODE, value: {{ .Values.auth.mode | quote }}}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- end -}}
