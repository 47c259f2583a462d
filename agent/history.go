package agent

import (
	"slices"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// historyLength is how many checkpoints a policy is told of.
const historyLength = 64

const maxErrorText = 500 // bytes of an error that policies are told

// record is what became of the checkpoints of one VM.
type record struct {
	since     time.Time
	attempted time.Time            // the last
	history   []*policy.Checkpoint // oldest first
	success   time.Time            // instant of the last success
	newest    string               // its id
	taken     uint64
	failures  uint64 // in a row
	lastError string
	retaken   []string // why attempts before the newest were discarded
	ramBytes  uint64
	usedBytes uint64
}

func (r *record) add(res *capture.Result, err error, mode string) {
	c := &policy.Checkpoint{AtNs: r.attempted.UnixNano(), Mode: mode, Ok: err == nil}
	if err != nil {
		// Policies are told by the wire, which takes nothing but UTF-8.
		text := strings.ToValidUTF8(err.Error(), "?")
		c.Error = strings.ToValidUTF8(text[:min(len(text), maxErrorText)], "")
		r.lastError = text
		r.failures++
	} else {
		m := res.Manifest
		st := m.Stats
		c.Id, c.Mode, c.Engine, c.Parent = m.ID, m.Mode, m.Engine, m.Parent
		c.AtNs = m.CreatedAt.UnixNano()
		c.PauseNs, c.TotalNs, c.StoredBytes, c.RawBytes, c.CapturedPages = st.PauseNS, st.TotalNS, st.StoredBytes, st.RAMBytes, st.CapturedPages
		c.ScanNs = res.Capture.ScanNS
		c.LeadNs, c.CommitNs = max(0, m.CreatedAt.Sub(r.attempted).Nanoseconds()), max(0, time.Since(m.CreatedAt).Nanoseconds())
		r.success, r.newest, r.failures, r.lastError = m.CreatedAt, m.ID, 0, ""
		r.taken++
		r.retaken = res.Retaken
		r.ramBytes, r.usedBytes = st.RAMBytes, st.RAMBytes
		if st.Pages > 0 {
			r.usedBytes = st.RAMBytes / st.Pages * (st.Pages - st.ZeroPages)
		}
	}
	r.history = append(r.history, c)
	r.history = r.history[max(0, len(r.history)-historyLength):]
}

// continues reports whether checkpoints store what was written since the one before, and
// not all that is in use: it is not ruled out, and those that were taken did. The first of a
// protection may have found nothing to continue, and so may one in between, after a change
// of the machine for instance; two in a row say that there is a reason that stays.
func (r *record) continues(o *capture.Options) bool {
	if o.Parent == capture.ParentNone || o.FullEvery == 1 {
		return false
	}
	full := 0
	for _, c := range slices.Backward(r.history) {
		switch {
		case c.GetParent() != "":
			return true
		case c.GetOk():
			full++
		}
		if full == 2 {
			return false
		}
	}
	return true
}

// proved reports whether an engine has taken a checkpoint of this VM.
func (r *record) proved(e capture.Engine) bool {
	return slices.ContainsFunc(r.history, func(c *policy.Checkpoint) bool { return c.GetEngine() == string(e) })
}

// signals is what is known now. What is not measured stays zero.
func (p *Protector) signals() *policy.Signals {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &p.record
	s := &policy.Signals{
		NowNs: time.Now().UnixNano(), ProtectedSinceNs: r.since.UnixNano(),
		Vm: &policypb.VM{Name: p.v.Name, RamBytes: r.ramBytes, UsedBytes: r.usedBytes,
			Vcpus: int32(p.machine.VCPUs), Accel: p.machine.Accel},
		History:      append([]*policy.Checkpoint{}, r.history...),
		Host:         &policypb.Host{StoreBytesPerSecond: policy.StoreSpeed(r.history)},
		Capabilities: p.capabilities(),
		Last:         p.verdict.Decision,
	}
	if p.p.Measure != nil {
		p.p.Measure(s)
	}
	if !r.success.IsZero() {
		s.LastSuccessNs = r.success.UnixNano()
	}
	return s
}

// capabilities are what a policy may ask for: what there is, and what the operator
// did not settle.
func (p *Protector) capabilities() *policypb.Capabilities {
	o := p.p.Capture
	c := &policypb.Capabilities{MinIntervalNs: int64(MinInterval), Keep: int32(p.p.KeepLast), Incremental: p.record.continues(&o),
		Modes: []string{string(o.Mode)}, Engines: []string{string(o.Engine)}, Compressions: []string{o.Compress}}
	if o.Mode == capture.Auto {
		c.Modes = []string{string(capture.Stop), string(capture.Buffer)}
		if p.gentlest == capture.COW {
			c.Modes = append(c.Modes, string(capture.COW))
		}
	}
	if o.Engine == capture.EngineAuto {
		c.Engines = []string{string(capture.EngineUffd)}
		if p.record.proved(capture.EngineBPF) {
			c.Engines = append(c.Engines, string(capture.EngineBPF))
		}
	}
	if len(p.p.Compressions) > 0 {
		c.Compressions = p.p.Compressions
	}
	return c
}
