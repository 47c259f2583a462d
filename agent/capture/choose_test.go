package capture

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

func TestChooseMode(t *testing.T) {
	anon := vm.RAMBlock{Name: "pc.ram", PageBytes: 4096, Backing: vm.Anonymous}
	disk := vm.RAMBlock{Name: "ram0", PageBytes: 4096, Backing: vm.PrivateFile, FileType: "ext4"}
	huge := vm.RAMBlock{Name: "huge", PageBytes: 2 << 20, Backing: vm.Hugetlb}
	gigantic := vm.RAMBlock{Name: "gigantic", PageBytes: 1 << 30, Backing: vm.Hugetlb}
	old := errors.New("this kernel lacks it")
	for _, c := range []struct {
		name   string
		blocks []vm.RAMBlock
		asked  Mode
		lacks  error
		mode   Mode // "" if refused
		says   string
	}{
		{"auto", []vm.RAMBlock{anon}, Auto, nil, COW, ""},
		{"cow", []vm.RAMBlock{anon}, COW, nil, COW, ""},
		{"stop", []vm.RAMBlock{anon}, Stop, nil, Stop, ""},
		{"auto, old kernel", []vm.RAMBlock{anon}, Auto, old, Stop, "this kernel lacks it"},
		{"cow, old kernel", []vm.RAMBlock{anon}, COW, old, "", "this kernel lacks it (use mode buffer or stop"},
		{"buffer, old kernel", []vm.RAMBlock{anon}, Buffer, old, Buffer, ""},
		{"auto, disk file", []vm.RAMBlock{anon, disk}, Auto, nil, Stop, "RAMBlock ram0 cannot be write-protected: its file is on ext4"},
		{"cow, disk file", []vm.RAMBlock{anon, disk}, COW, nil, "", "RAMBlock ram0: cannot be write-protected: its file is on ext4"},
		{"auto, both", []vm.RAMBlock{disk}, Auto, old, Stop, "this kernel lacks it"},
		{"auto, huge pages", []vm.RAMBlock{huge}, Auto, nil, COW, ""},
		{"auto, huge pages, old kernel", []vm.RAMBlock{huge}, Auto, old, Stop, "this kernel lacks it"},
		{"stop, gigantic pages", []vm.RAMBlock{gigantic}, Stop, nil, "", "its pages are 1073741824 bytes"},
	} {
		mode, why, err := chooseMode(c.blocks, c.asked, c.lacks)
		if mode != c.mode || err != nil && !problem.Is(err, problem.Refused) || (err != nil) != (c.mode == "") {
			t.Errorf("%s: %q, %v", c.name, mode, err)
			continue
		}
		if err != nil {
			why = err.Error()
		}
		if c.says == "" && why != "" || !strings.Contains(why, c.says) {
			t.Errorf("%s: %q, want %q", c.name, why, c.says)
		}
	}
}

// TestOverlayDirIsAbsolute: the guardian of an agent that died looks for the overlays
// from elsewhere; one that it does not find is taken for the last that a guest wrote.
func TestOverlayDirIsAbsolute(t *testing.T) {
	if _, err := (Options{OverlayDir: "overlays"}).withDefaults(); !problem.Is(err, problem.Usage) {
		t.Errorf("relative: %v", err)
	}
	if _, err := (Options{OverlayDir: "/overlays"}).withDefaults(); err != nil {
		t.Error(err)
	}
}

// proofs is what is known, of which what is untried is found out if it is waited for.
type proofs struct {
	known, found error
	asked        int // how often it was waited for
}

func (p *proofs) Known(string, source.Kind) error { return p.known }

func (p *proofs) Prove(context.Context, string, source.Kind) error {
	p.asked++
	p.known = p.found
	return p.found
}

// TestChooseEngine: auto waits for no trial, and takes bpf as soon as it was proved; who asks
// for bpf waits, and is told to come again where the host had not the time.
func TestChooseEngine(t *testing.T) {
	untried, failed := fmt.Errorf("%w: no time", ErrUntried), errors.New("a page is wrong")
	anon := vm.RAMBlock{Name: "pc.ram", PageBytes: 4096, Backing: vm.Anonymous}
	huge := vm.RAMBlock{Name: "huge", PageBytes: 2 << 20, Backing: vm.Hugetlb}
	for _, c := range []struct {
		name         string
		block        vm.RAMBlock
		accel        string
		asked        Engine
		known, found error
		engine       Engine
		code         problem.Code // if it is refused
		says         string
		waits        int
	}{
		{"auto, proved", anon, "tcg", EngineAuto, nil, nil, EngineBPF, "", "", 0},
		{"auto, untried", anon, "tcg", EngineAuto, untried, nil, EngineUffd, "", "ckagent doctor", 0},
		{"auto, failed", anon, "tcg", EngineAuto, failed, nil, EngineUffd, "", "a page is wrong", 0},
		{"auto, kvm", anon, "kvm", EngineAuto, nil, nil, EngineUffd, "", "experimental", 0},
		{"auto, huge", huge, "tcg", EngineAuto, nil, nil, EngineUffd, "", "hugetlbfs", 0},
		{"uffd", anon, "tcg", EngineUffd, nil, nil, EngineUffd, "", "", 0},
		{"bpf, proved", anon, "kvm", EngineBPF, nil, nil, EngineBPF, "", "", 0},
		{"bpf, proved now", anon, "tcg", EngineBPF, untried, nil, EngineBPF, "", "", 1},
		{"bpf, fails now", anon, "tcg", EngineBPF, untried, failed, "", problem.Refused, "a page is wrong", 1},
		{"bpf, no time", anon, "tcg", EngineBPF, untried, untried, "", problem.Busy, "no time", 1},
		{"bpf, failed", anon, "tcg", EngineBPF, failed, nil, "", problem.Refused, "a page is wrong", 0},
		{"bpf, huge", huge, "tcg", EngineBPF, nil, nil, "", problem.Refused, "hugetlbfs", 0},
	} {
		p := &proofs{known: c.known, found: c.found}
		target := &vm.Target{Accel: c.accel, Blocks: []vm.RAMBlock{c.block}}
		engine, lacks, err := chooseEngine(t.Context(), target, c.asked, p)
		said := fmt.Sprint(lacks, err)
		if engine != c.engine || err != nil && problem.CodeOf(err) != c.code || (err != nil) != (c.code != "") ||
			!strings.Contains(said, c.says) || c.says == "" && lacks != nil || p.asked != c.waits {
			t.Errorf("%s: %q, %s, waited %d times", c.name, engine, said, p.asked)
		}
	}
	target := &vm.Target{Accel: "tcg", Blocks: []vm.RAMBlock{anon}}
	if engine, lacks, err := chooseEngine(t.Context(), target, EngineAuto, nil); engine != EngineUffd || !errors.Is(lacks, ErrUntried) || err != nil {
		t.Errorf("nothing known: %q, %v, %v", engine, lacks, err)
	}
	// As a VM sees it: with uffd at first, with bpf after somebody found out.
	p := &proofs{known: untried}
	if _, engine, _ := Choose(t.Context(), target, Options{Proofs: p}); engine == EngineBPF {
		t.Error("taken untried")
	}
	if err := p.Prove(t.Context(), "tcg", source.Anonymous); err != nil {
		t.Fatal(err)
	}
	if engine, _, _ := chooseEngine(t.Context(), target, EngineAuto, p); engine != EngineBPF {
		t.Errorf("proved, and engine %q", engine)
	}
}
