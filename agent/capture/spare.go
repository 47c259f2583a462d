package capture

import (
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/selfexe"
)

// Spare is a fault server that is started ahead of the checkpoint that may need it. It
// has nothing to do with any VM before, and is not needed for a checkpoint to succeed. It
// ends when it is closed, and by itself when we die.
//
// It has one owner at a time. The methods may be called of nil, which never has one.
type Spare struct {
	Helper []string // as in Options
	Engine Engine   // that is asked for; it is a guess

	proc *faultserver.Process
}

// NewSpare is the spare for checkpoints of a mode by an engine; nil if they need none.
func NewSpare(o Options) *Spare {
	if o.Mode != "" && o.Mode != Auto && o.Mode != COW {
		return nil
	}
	return &Spare{Helper: o.Helper, Engine: o.Engine}
}

// Start starts it, unless there is one. Whoever takes a checkpoint hears of what keeps a
// fault server from being started.
func (p *Spare) Start() {
	if p == nil || p.proc != nil || faultserver.Supported() != nil {
		return
	}
	engine := faultserver.Kernel // what auto comes to where it can
	if p.Engine == EngineUffd {
		engine = faultserver.Synchronous
	}
	self, args := faultServerCommand(p.Helper)
	p.proc, _ = faultserver.Launch(self, args, engine)
}

// take gives it away; nil if there is none.
func (p *Spare) take() *faultserver.Process {
	if p == nil {
		return nil
	}
	proc := p.proc
	p.proc = nil
	return proc
}

// Close ends it. Another may be started.
func (p *Spare) Close() error {
	if proc := p.take(); proc != nil {
		return proc.Close()
	}
	return nil
}

// faultServerCommand is how a fault server is started.
func faultServerCommand(helper []string) (self string, args []string) {
	helper = selfexe.Or(helper)
	return helper[0], append(helper[1:len(helper):len(helper)], FaultServerVerb)
}
