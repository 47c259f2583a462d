package agent

import (
	"slices"
	"testing"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/plugins/policy"
)

// TestCapabilities: a policy is told what checkpoints of this VM do, and may ask for what
// there is.
func TestCapabilities(t *testing.T) {
	full, child := &policy.Checkpoint{Ok: true, Engine: "uffd"}, &policy.Checkpoint{Ok: true, Engine: "bpf", Parent: "p"}
	failed := &policy.Checkpoint{Error: "busy"}
	every := int32(1)
	for what, c := range map[string]struct {
		spec        *apipb.Spec
		history     []*policy.Checkpoint
		incremental bool
		engines     []string
	}{
		"nothing was taken yet":         {&apipb.Spec{}, nil, true, []string{"uffd"}},
		"a first one":                   {&apipb.Spec{}, []*policy.Checkpoint{full, failed}, true, []string{"uffd"}},
		"they continue each other":      {&apipb.Spec{}, []*policy.Checkpoint{full, failed, child}, true, []string{"uffd", "bpf"}},
		"a full one in between":         {&apipb.Spec{}, []*policy.Checkpoint{child, full}, true, []string{"uffd", "bpf"}},
		"there is a reason that stays":  {&apipb.Spec{}, []*policy.Checkpoint{child, full, failed, full}, false, []string{"uffd", "bpf"}},
		"the operator wants full ones":  {&apipb.Spec{Parent: capture.ParentNone}, nil, false, []string{"uffd"}},
		"none that can be continued":    {&apipb.Spec{FullEvery: &every}, []*policy.Checkpoint{full}, false, []string{"uffd"}},
		"the operator wants one engine": {&apipb.Spec{Engine: "uffd"}, []*policy.Checkpoint{full, child}, true, []string{"uffd"}},
	} {
		_, prot, err := Planned(c.spec)
		if err != nil {
			t.Fatal(what, err)
		}
		got := (&Protector{p: prot, gentlest: capture.COW, record: record{history: c.history}}).capabilities()
		if got.GetIncremental() != c.incremental || !slices.Equal(got.GetEngines(), c.engines) {
			t.Errorf("%s: %v", what, got)
		}
	}
}
