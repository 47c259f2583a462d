package cmdline

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// configGroups are the groups of a -readconfig file whose name differs from the
// option that does the same.
var configGroups = map[string]string{
	"memory": "m", "smp-opts": "smp", "boot-opts": "boot",
}

const (
	maxConfigBytes = 1 << 20
	maxConfigLine  = 4096 // QEMU reads lines of up to 1023 bytes
)

// ParseConfig reads a QEMU configuration file (-readconfig) and returns the
// options it stands for: [chardev "mon0"] with backend = "socket" is
// -chardev backend=socket,id=mon0. At most 1 MiB is read.
func ParseConfig(r io.Reader) ([]Option, error) {
	var opts []Option
	var group string
	var kv *KeyVal
	flush := func() {
		if kv != nil {
			opts = append(opts, Option{Name: group, Value: kv.String(), HasValue: true})
		}
	}
	limited := &io.LimitedReader{R: r, N: maxConfigBytes + 1}
	sc := bufio.NewScanner(limited)
	sc.Buffer(make([]byte, 0, maxConfigLine), maxConfigLine)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if line[0] == '[' {
			flush()
			name, id, ok := configHeader(line)
			if !ok {
				return nil, fmt.Errorf("configuration line %d, %q: %w", n, line, ErrSyntax)
			}
			group = name
			if o, ok := configGroups[name]; ok {
				group = o
			}
			kv = &KeyVal{changed: true}
			kv.implied, _ = Implied(group)
			if id != "" {
				kv.Set("id", id)
			}
			continue
		}
		key, val, ok := strings.Cut(line, "=")
		val = strings.TrimSpace(val)
		key = strings.TrimSpace(key)
		if !ok || kv == nil || key == "" || strings.ContainsAny(key, ",\"{ \t") ||
			len(val) < 2 || val[0] != '"' || strings.IndexByte(val[1:], '"') != len(val)-2 {
			return nil, fmt.Errorf("configuration line %d, %q: %w", n, line, ErrSyntax)
		}
		if len(kv.pairs) == maxPairs {
			return nil, fmt.Errorf("configuration group with more than %d keys: %w", maxPairs, ErrSyntax)
		}
		// Not Set: lists are written by repeating the key.
		kv.pairs = append(kv.pairs, pair{key: key, val: val[1 : len(val)-1]})
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if limited.N <= 0 {
		return nil, fmt.Errorf("configuration larger than %d bytes: %w", maxConfigBytes, ErrSyntax)
	}
	flush()
	return opts, nil
}

// configHeader takes [group] or [group "id"] apart.
func configHeader(line string) (group, id string, ok bool) {
	inner, ok := strings.CutPrefix(line, "[")
	if !ok {
		return "", "", false
	}
	inner, ok = strings.CutSuffix(inner, "]")
	if !ok {
		return "", "", false
	}
	group, id, quoted := strings.Cut(strings.TrimSpace(inner), " ")
	if quoted {
		id = strings.TrimSpace(id)
		if len(id) < 2 || id[0] != '"' || id[len(id)-1] != '"' || strings.Contains(id[1:len(id)-1], `"`) {
			return "", "", false
		}
		id = id[1 : len(id)-1]
	}
	return group, id, group != "" && group[0] != '-' && !strings.ContainsAny(group, "\"[]=,\t")
}
