package vm

import "testing"

func TestFileOf(t *testing.T) {
	for name, want := range map[string]string{
		"/vm/a.qcow2": "/vm/a.qcow2",
		"nbd:unix:/s": "nbd:unix:/s",
		`json:{"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "/vm/a.qcow2"}}`:                   "/vm/a.qcow2",
		`json:{"throttle-group": "g", "driver": "throttle", "file": {"driver": "raw", "file": {"driver": "file", "filename": "a b"}}}`: "a b",
		`json:{"driver": "qcow2", "file": "node"}`: `json:{"driver": "qcow2", "file": "node"}`,
		`json:{"driver": "null-co"}`:               `json:{"driver": "null-co"}`,
		`json:{`:                                   `json:{`,
	} {
		if got := fileOf(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
