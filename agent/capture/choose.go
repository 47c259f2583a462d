package capture

import (
	"fmt"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

// Choose says which mode and engine a VM gets by itself, and why not the best.
func Choose(blocks []vm.RAMBlock) (Mode, Engine, string) {
	mode, why, err := chooseMode(blocks, Auto, faultserver.Supported())
	switch {
	case err != nil:
		return Stop, EngineNone, err.Error()
	case mode == COW:
		return COW, EngineUffd, ""
	}
	return mode, EngineNone, why
}

// chooseMode settles auto, and refuses a mode that the VM's RAM or the kernel
// (lacks, nil if it has all that mode cow needs) does not allow. why tells what
// keeps auto from mode cow.
func chooseMode(blocks []vm.RAMBlock, asked Mode, lacks error) (mode Mode, why string, err error) {
	for i := range blocks {
		if b := &blocks[i]; b.PageBytes != source.PageBytes {
			return "", "", problem.New(problem.Refused, "checkpoint", "RAMBlock "+b.Name, "its pages are %d bytes", b.PageBytes).
				WithHint("huge page RAM is not supported in this version; use 4 KiB pages, transparent huge pages included")
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
