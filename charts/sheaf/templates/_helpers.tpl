{{- define "sheaf.name" -}}
{{- $n := .Values.fullnameOverride }}
{{- if not $n }}
{{- $n = .Release.Name }}
{{- if not (contains .Chart.Name $n) }}
{{- $n = printf "%s-%s" $n .Chart.Name }}
{{- end }}
{{- end }}
{{- $n | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "sheaf.connector" -}}
{{ include "sheaf.name" . }}-connector
{{- end }}

{{- define "sheaf.nats" -}}
{{ include "sheaf.name" . }}-nats
{{- end }}

{{- define "sheaf.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sheaf.connector" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.create is off: give serviceAccount.name" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "sheaf.select" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sheaf.labels" -}}
{{ include "sheaf.select" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* image: a dict of image (of values) and tag (that the image has if values have none) */ -}}
{{- define "sheaf.image" -}}
{{- if .image.digest }}
{{- printf "%s@%s" .image.repository .image.digest }}
{{- else }}
{{- printf "%s:%s" .image.repository (default .tag .image.tag) }}
{{- end }}
{{- end }}

{{- define "sheaf.natsURL" -}}
{{- if .Values.nats.enabled }}
{{- if .Values.nats.external.url }}
{{- fail "both nats.enabled and nats.external.url are set: set nats.enabled=false to use your own NATS" }}
{{- end }}
{{- printf "nats://%s.%s:4222" (include "sheaf.nats" .) .Release.Namespace }}
{{- else }}
{{- required "nats.enabled is off: give nats.external.url, such as nats://nats.example.com:4222" .Values.nats.external.url }}
{{- end }}
{{- end }}

{{- define "sheaf.credsSecret" -}}
{{- if .Values.nats.enabled }}{{ .Values.nats.auth.credsSecret }}{{ else }}{{ .Values.nats.external.credsSecret }}{{ end }}
{{- end }}

{{- define "sheaf.gatewayURL" -}}
{{- default (printf "http://gateway.%s:%v" .Values.gateway.namespace .Values.gateway.port) .Values.gateway.url }}
{{- end }}

{{- /* what every container may do: nothing but run */ -}}
{{- define "sheaf.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* podSecurity: the user that a pod runs as */ -}}
{{- define "sheaf.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* peers of network policies */ -}}
{{- define "sheaf.peerConnector" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ .Release.Namespace }}
podSelector:
  matchLabels:
    {{- include "sheaf.select" . | nindent 4 }}
    app.kubernetes.io/component: connector
{{- end }}

{{- define "sheaf.peerGateway" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ .Values.gateway.namespace }}
podSelector:
  matchLabels:
    {{- toYaml .Values.gateway.podLabels | nindent 4 }}
{{- end }}

{{- define "sheaf.peerMasters" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ .Values.functions.namespace }}
podSelector:
  matchExpressions:
    - key: faas_function
      operator: In
      values:
        {{- toYaml .Values.functions.masters | nindent 8 }}
{{- end }}

{{- /* port: that a URL names, or that its scheme means */ -}}
{{- define "sheaf.port" -}}
{{- $u := urlParse (trim .) }}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $u.host) | default (get (dict "http" "80" "https" "443" "tls" "4222" "nats" "4222" "ws" "80" "wss" "443") $u.scheme) | default "4222" }}
{{- end }}
