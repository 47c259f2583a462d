package capture

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

// Choose says which mode and engine a VM gets by itself, and why not the best.
func Choose(ctx context.Context, t *vm.Target, o Options) (Mode, Engine, string) {
	mode, why, err := chooseMode(t.Blocks, Auto, faultserver.Supported())
	switch {
	case err != nil:
		return Stop, EngineNone, err.Error()
	case mode != COW:
		return mode, EngineNone, why
	}
	engine, lacks, err := chooseEngine(ctx, t, EngineAuto, o.Proofs)
	if err != nil {
		return Stop, EngineNone, err.Error()
	}
	if lacks != nil {
		why = lacks.Error()
	}
	return COW, engine, why
}

// Proofs says whether engine bpf was proved on this host for an accelerator and a kind of
// RAM: nil, or why not.
type Proofs interface {
	// Known waits for nothing.
	Known(accel string, ram source.Kind) error
	// Prove finds out what is not known, which takes a second and on a busy host a minute.
	Prove(ctx context.Context, accel string, ram source.Kind) error
}

// ErrUntried is of an engine of which it is not known whether it can be trusted.
var ErrUntried = errors.New("engine bpf was not tried yet on this host (ckagent doctor does that, and ckagent daemon when it starts)")

// chooseEngine settles auto, which waits for no trial, and refuses an engine that was not
// proved on this host. lacks is what keeps auto from engine bpf.
func chooseEngine(ctx context.Context, t *vm.Target, asked Engine, proofs Proofs) (engine Engine, lacks, err error) {
	if asked == EngineUffd {
		return EngineUffd, nil, nil
	}
	if asked == EngineAuto && t.Accel == "kvm" {
		return EngineUffd, errors.New("engine bpf is experimental under KVM and is taken only if it is asked for"), nil
	}
	if i := slices.IndexFunc(t.Blocks, func(b vm.RAMBlock) bool { return b.PageBytes != source.PageBytes }); i >= 0 {
		lacks = fmt.Errorf("engine bpf copies pages of 4 KiB, and RAMBlock %s lies in huge ones of hugetlbfs", t.Blocks[i].Name)
	} else {
		lacks = proved(ctx, t, asked, proofs)
	}
	switch {
	case ctx.Err() != nil:
		return "", nil, problem.New(problem.Cancelled, "checkpoint", "", "%w", ctx.Err())
	case lacks == nil:
		return EngineBPF, nil, nil
	case asked == EngineAuto:
		return EngineUffd, lacks, nil
	case errors.Is(lacks, ErrUntried):
		return "", nil, problem.New(problem.Busy, "checkpoint", "", "%w", lacks).
			WithHint("try again when the host is less busy, or use engine uffd or auto")
	}
	return "", nil, problem.New(problem.Refused, "checkpoint", "", "engine bpf: %w", lacks).
		WithHint("use engine uffd, or auto, which takes bpf where it was proved; ckagent doctor shows what was")
}

// proved returns nil if engine bpf was proved for all of the VM's RAM. Who asked for it by
// name waits for a trial.
func proved(ctx context.Context, t *vm.Target, asked Engine, proofs Proofs) error {
	if proofs == nil {
		return ErrUntried
	}
	for _, kind := range kindsOf(t.Blocks) {
		err := proofs.Known(t.Accel, kind)
		if asked == EngineBPF && errors.Is(err, ErrUntried) {
			err = proofs.Prove(ctx, t.Accel, kind)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// kindsOf are the kinds of RAM among the blocks.
func kindsOf(blocks []vm.RAMBlock) []source.Kind {
	var out []source.Kind
	for i := range blocks {
		if k := sourceBlock(&blocks[i]).Kind; !slices.Contains(out, k) {
			out = append(out, k)
		}
	}
	return out
}

// chooseMode settles auto, and refuses a mode that the VM's RAM or the kernel
// (lacks, nil if it has all that mode cow needs) does not allow. why tells what
// keeps auto from mode cow.
func chooseMode(blocks []vm.RAMBlock, asked Mode, lacks error) (mode Mode, why string, err error) {
	for i := range blocks {
		if b := &blocks[i]; b.PageBytes != source.PageBytes && b.PageBytes != source.WholePages*source.PageBytes {
			return "", "", problem.New(problem.Refused, "checkpoint", "RAMBlock "+b.Name, "its pages are %d bytes", b.PageBytes).
				WithHint("use pages of 2 MiB or 4 KiB, transparent huge pages included")
		}
	}
	if asked != Auto && asked != COW {
		return asked, "", nil
	}
	object, hint := "", ""
	if lacks != nil {
		why, hint = lacks.Error(), "use mode buffer or stop; ckagent doctor shows what each gap costs and how to mend it"
	}
	for i := range blocks {
		if ok, reason := blocks[i].CanWriteProtect(); !ok && why == "" {
			object, why = "RAMBlock "+blocks[i].Name, "cannot be write-protected: "+reason
			hint = "use mode stop, or give the VM its RAM on tmpfs, a memfd or anonymous memory"
		}
	}
	switch {
	case why == "":
		return COW, "", nil
	case asked == COW:
		return "", "", problem.New(problem.Refused, "checkpoint", object, "%s", why).WithHint("%s", hint)
	case object != "":
		why = fmt.Sprintf("%s %s", object, why)
	}
	return Stop, why, nil
}
