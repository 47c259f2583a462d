package metrics

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/signals/estimate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func snapshot() signals.Snapshot {
	return signals.Snapshot{Missing: []signals.Lack{{Program: "net"}}, VMs: []signals.Sample{
		{PID: 7, VM: "web", Protected: true,
			Dirty:   &signals.Dirty{Rate: 2000, Error: 100, WSSBytes: 1 << 20, Windows: 3, Shares: &estimate.Shares{Zero: 0.5}},
			VCPU:    &signals.VCPU{HasSlots: true, Slots: 4, IdleNS: 2e9, Each: []signals.VCPUTimes{{RunNS: 1e9, WaitNS: 5e8}}},
			Network: []signals.Network{{Device: "tap0", InBytes: 10, OutBytes: 20, Requests: 5, Answers: 4, Pending: 1}, {Device: "sockets", Estimate: true}},
			Disk:    &signals.Disk{Bytes: 4096, Writes: 1}},
		{PID: 8}, // nothing known but that it is there
		// Anybody on the host may call a QEMU by such bytes.
		{PID: 9, VM: "b\xfccher", Network: []signals.Network{{Device: "tap\xff", Requests: 6}}},
	}}
}

func TestSeries(t *testing.T) {
	c := New(Source{Snapshot: snapshot})
	want := `
# HELP ckagent_vm_dirty_pages_per_second Distinct 4 KiB pages written per second, by sampling.
# TYPE ckagent_vm_dirty_pages_per_second gauge
ckagent_vm_dirty_pages_per_second{pid="7",vm="web"} 2000
# HELP ckagent_vm_protected 1 if ckagent is attached to the VM or checkpoints it now.
# TYPE ckagent_vm_protected gauge
ckagent_vm_protected{pid="7",vm="web"} 1
ckagent_vm_protected{pid="8",vm="8"} 0
ckagent_vm_protected{pid="9",vm="b?cher"} 0
# HELP ckagent_vm_vcpu_wait_seconds_total Time a vCPU was ready and the host had no processor for it.
# TYPE ckagent_vm_vcpu_wait_seconds_total counter
ckagent_vm_vcpu_wait_seconds_total{pid="7",vcpu="0",vm="web"} 0.5
# HELP ckagent_vm_network_requests_total TCP requests to the VM.
# TYPE ckagent_vm_network_requests_total counter
ckagent_vm_network_requests_total{device="tap0",pid="7",vm="web"} 5
ckagent_vm_network_requests_total{device="tap?",pid="9",vm="b?cher"} 6
# HELP ckagent_signal_missing 1 for each signal that this host does not give.
# TYPE ckagent_signal_missing gauge
ckagent_signal_missing{program="net"} 1
`
	if err := testutil.CollectAndCompare(c, strings.NewReader(want), "ckagent_vm_dirty_pages_per_second", "ckagent_vm_protected",
		"ckagent_vm_vcpu_wait_seconds_total", "ckagent_vm_network_requests_total", "ckagent_signal_missing"); err != nil {
		t.Error(err)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	problems, err := testutil.GatherAndLint(r)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}

func TestListen(t *testing.T) {
	for _, a := range []string{"0.0.0.0:0", ":9464", "192.0.2.1:1", "nonsense", "[::]:0"} {
		if l, err := Listen(a); !problem.Is(err, problem.Usage) {
			t.Errorf("%s: %v %v", a, l, err)
		}
	}
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(l.Addr().String()); !problem.Is(err, problem.Failed) {
		t.Errorf("a port in use: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, New(Source{Snapshot: snapshot})) }()
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	res, err := client.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(res.Body)
	res.Body.Close()
	for _, want := range []string{"ckagent_vm_disk_written_bytes_total", "process_resident_memory_bytes", "go_goroutines"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s", want)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
