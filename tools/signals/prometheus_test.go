package signals

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/guest"
	"github.com/ckagent/ckagent/tools/vmtest"
)

func promtool(t testing.TB) guest.Monitoring {
	t.Helper()
	m, err := guest.Prometheus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestAlertRules: promtool's own unit tests of the rules.
func TestAlertRules(t *testing.T) {
	c := exec.Command(promtool(t).Promtool, "test", "rules", "alerts_test.yml")
	c.Dir = "prometheus"
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// queries are all expressions of the dashboard and, without their thresholds, of the
// alert rules.
func queries(t testing.TB) []string {
	t.Helper()
	b, err := os.ReadFile("prometheus/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			q.Expr = strings.NewReplacer("$__rate_interval", "10s", "$vm", ".*").Replace(q.Expr)
			out = append(out, q.Expr)
		}
	}
	if b, err = os.ReadFile("prometheus/alerts.yml"); err != nil {
		t.Fatal(err)
	}
	threshold := regexp.MustCompile(`\s(==|<|>)\s[^<>=]+$`)
	for line := range strings.Lines(string(b)) {
		if expr, ok := strings.CutPrefix(strings.TrimSpace(line), "expr: "); ok {
			if !threshold.MatchString(expr) {
				t.Errorf("no threshold in %q", expr)
			}
			out = append(out, threshold.ReplaceAllString(expr, ""))
		}
	}
	if len(out) < 20 {
		t.Fatalf("only %d queries", len(out))
	}
	return out
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// background runs a program until the test ends; its output is shown if that fails.
func background(t testing.TB, dir string, args ...string) *exec.Cmd {
	t.Helper()
	c := exec.Command(args[0], args[1:]...)
	var out bytes.Buffer
	c.Dir, c.Stdout, c.Stderr = dir, &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Signal(unix.SIGTERM)
		_ = c.Wait() // ended by us
		if t.Failed() {
			t.Logf("%v:\n%s", c.Args, out.String()[max(0, out.Len()-3000):])
		}
	})
	return c
}

func get(t testing.TB, target string) (string, bool) {
	t.Helper()
	r, err := http.Get(target)
	if err != nil {
		return "", false
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err == nil && r.StatusCode == http.StatusOK
}

// TestEveryQueryHasData: a real Prometheus scrapes a ckagent that watches a VM with
// all that a VM has; every query of the dashboard and the alerts answers.
func TestEveryQueryHasData(t *testing.T) {
	prom := promtool(t)
	tap := newTap(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Linux, MemoryMiB: 192, WSMiB: 16, Rate: 2000, Append: tap.guest + " GD_WORDS=64 GD_PATTERN=hot", Args: tap.args})
	store := t.TempDir()
	if code := run(t, nil, "checkpoint", pidOf(v.PID()), "--store", store, "--name", "web"); code != 0 {
		t.Fatalf("checkpoint: exit code %d", code)
	}
	stop := tap.requests(t, 50)
	defer stop()
	exporter, server := freePort(t), freePort(t)
	background(t, "", binary, "top", pidOf(v.PID()), "--metrics", exporter, "--interval", "500ms", "--dirty-every", "1s", "--store", store, "--json")
	dir := t.TempDir()
	rules, err := filepath.Abs("prometheus/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n- job_name: ckagent\n  static_configs: [{targets: [%q]}]\n", rules, exporter)
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	background(t, dir, prom.Prometheus, "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address="+server)
	type answer struct {
		Status string
		Data   struct{ Result []json.RawMessage }
	}
	for _, q := range queries(t) {
		eventually(t, q, func() bool {
			body, ok := get(t, "http://"+server+"/api/v1/query?query="+url.QueryEscape(q))
			var a answer
			return ok && json.Unmarshal([]byte(body), &a) == nil && a.Status == "success" && len(a.Data.Result) > 0
		})
	}
	body, ok := get(t, "http://"+exporter+"/metrics")
	if !ok {
		t.Fatal("no metrics")
	}
	c := exec.Command(prom.Promtool, "check", "metrics")
	c.Stdin = strings.NewReader(body)
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	// Every series is described.
	docs, err := os.ReadFile("../../docs/signals.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(body) {
		if name, ok := strings.CutPrefix(line, "# TYPE ckagent_"); ok {
			name, _, _ = strings.Cut(name, " ")
			if !bytes.Contains(docs, []byte("ckagent_"+name)) {
				t.Errorf("docs/signals.md does not say what ckagent_%s is", name)
			}
		}
	}
	v.Invariants()
}
