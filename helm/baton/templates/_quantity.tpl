{{/* A CPU quantity ("8", "500m") in thousandths. Argument: the quantity. */}}
{{- define "baton.millicpu" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}
{{- trimSuffix "m" $text | float64 | ceil | int64 -}}
{{- else -}}
{{- mulf (float64 $text) 1000.0 | ceil | int64 -}}
{{- end -}}
{{- end -}}

{{/* A memory quantity ("64Gi", "500M") in MiB, rounded down. Argument: the quantity. */}}
{{- define "baton.mebibytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9.]+" $text | float64 -}}
{{- $unit := trimPrefix (regexFind "^[0-9.]+" $text) $text -}}
{{- $bytes := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- if not (hasKey $bytes $unit) -}}{{- fail (printf "%q is no memory quantity such as 64Gi or 500M" $text) -}}{{- end -}}
{{- divf (mulf $number (get $bytes $unit)) 1048576.0 | floor | int64 -}}
{{- end -}}
