package restore

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]qmp.Version{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright": {Major: 7, Minor: 2, Micro: 22},
		"QEMU emulator version 10.0.2":                                  {Major: 10, Minor: 0, Micro: 2},
		"QEMU emulator version 9.1":                                     {Major: 9, Minor: 1},
	} {
		if v, err := parseVersion(text); err != nil || v != want {
			t.Errorf("%q: %v, %v", text, v, err)
		}
	}
	for _, text := range []string{"", "bash, version 5.2", "QEMU emulator version x", "QEMU emulator version 99999.1"} {
		if v, err := parseVersion(text); err == nil {
			t.Errorf("%q is %v", text, v)
		}
	}
}

func TestOlderThan(t *testing.T) {
	v := qmp.Version{Major: 7, Minor: 2, Micro: 22}
	for recorded, want := range map[string]bool{"10.0.2": true, "7.3.0": true, "7.2.0": false, "7.2.99": false, "6.9.1": false, "": false, "x": false} {
		if got := olderThan(v, recorded); got != want {
			t.Errorf("7.2.22 older than %q: %v", recorded, got)
		}
	}
}

func TestKnowsMachine(t *testing.T) {
	const list = "Supported machines are:\npc                   Standard PC (alias of pc-i440fx-7.2)\npc-i440fx-7.2        Standard PC (default)\n"
	for name, want := range map[string]bool{"pc-i440fx-7.2": true, "pc": true, "pc-i440fx-7": false, "Standard": false, "pc-q35-7.2": false} {
		if got := knowsMachine(list, name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestNewerSection holds a real device state against what a real QEMU says it loads,
// and then one whose interrupt controller is of a version that nobody knows.
func TestNewerSection(t *testing.T) {
	state, err := os.ReadFile("../agent/vm/vmstate/testdata/pc-i440fx-7.2.state")
	if err != nil {
		t.Fatal(err)
	}
	dump, err := exec.Command("qemu-system-x86_64", "-machine", "pc-i440fx-7.2", "-dump-vmstate", "/dev/stdout").Output()
	if err != nil {
		t.Fatal(err)
	}
	if newer, err := newerSection(state, dump); err != nil || newer != "" {
		t.Fatalf("%q, %v", newer, err)
	}
	l, err := vmstate.Parse(state)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, s := range l.Sections {
		if s.Name == "ioapic" {
			binary.BigEndian.PutUint32(state[s.Offset-4:], 99)
			found = true
		}
	}
	if !found {
		t.Fatal("no such section: the test tests nothing")
	}
	if newer, err := newerSection(state, dump); err != nil || !strings.Contains(newer, "ioapic") || !strings.Contains(newer, "99") {
		t.Errorf("%q, %v", newer, err)
	}
	for _, bad := range []string{"", "{}", "[]", `{"x": 1}`} {
		if _, err := newerSection(state, []byte(bad)); err == nil {
			t.Errorf("%q was taken for a list", bad)
		}
	}
}

// TestOlderThatFails has a load fail that every check had let pass.
func TestOlderThatFails(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte("qemu-system-x86_64: Unknown savevm section or instance 'new' 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	x := &run{m: &image.Manifest{QEMU: image.QEMU{Version: "10.0.2"}}, q: &qemu{log: log}}
	if err := x.loadError(t.Context(), errLoad); !problem.Is(err, problem.Failed) {
		t.Errorf("of the same version: %v", err)
	}
	x.older = true
	if err := x.loadError(t.Context(), errLoad); !problem.Is(err, problem.Refused) || !errors.Is(err, errLoad) ||
		!strings.Contains(err.Error(), "Unknown savevm section") || !strings.Contains(err.Error(), "older than QEMU 10.0.2") {
		t.Errorf("%v", err)
	}
}
