package layers

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/ckagent/ckagent/"

// layers lists the packages from the bottom up; a folder stands for itself and
// everything below it unless a longer entry matches. A package may import from
// lower layers, from its own folder's subfolders, and never upwards.
var layers = [][]string{
	{"uffd", "bpf", "agent/problem", "agent/cgroup", "agent/heartbeat", "agent/procstat", "agent/kvm", "agent/controller", "agent/selfexe", "agent/flock", "agent/passfd"},
	{"agent/affinity", "agent/cmdline", "agent/image", "agent/libvirt", "agent/api", "plugins/policy"},
	{"agent/qmp", "agent/guestagent", "agent/vm/vmstate", "agent/vm/ramstream", "agent/vm/inject", "agent/doctor", "agent/capture/arena", "agent/capture/source"},
	{"agent/vm", "agent/store"},
	{"agent/guardian", "agent/capture/faultserver", "agent/signals", "agent/export", "agent/ingest"},
	{"agent/capture"},
	{"agent/taker"},
	{"plugins"},
	{"agent"},
	{"agent/daemon"},
	{"restore", "plugins/policy/policytest"},
	{"tools"},
	{"cmd"},
}

// never are imports that the order of the layers alone would allow.
var never = []struct{ from, to, why string }{
	{"restore", "agent", "restore and the host agent know nothing of each other"},
	{"agent", "restore", "restore and the host agent know nothing of each other"},
	{"agent/image", "agent/vm", "an image is data: it does not know what it was taken from"},
}

type pkg struct {
	ImportPath, Dir string
	Imports         []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// layerOf finds the layer whose entry is the longest prefix of a package.
func layerOf(path string) (layer int, entry string) {
	layer = -1
	for i, l := range layers {
		for _, e := range l {
			if (path == e || strings.HasPrefix(path, e+"/")) && len(e) > len(entry) {
				layer, entry = i, e
			}
		}
	}
	return layer, entry
}

func TestArrowsPointDown(t *testing.T) {
	for _, p := range packages(t) {
		from := strings.TrimPrefix(p.ImportPath, module)
		layer, entry := layerOf(from)
		if layer < 0 {
			t.Errorf("%s is in no layer", from)
			continue
		}
		for _, imp := range p.Imports {
			to, ours := strings.CutPrefix(imp, module)
			if !ours {
				continue
			}
			l, e := layerOf(to)
			if l > layer || l == layer && e != entry {
				t.Errorf("%s (layer of %s) imports %s (layer of %s): arrows point down", from, entry, to, e)
			}
			if strings.HasPrefix(to, "cmd/") {
				t.Errorf("%s imports %s: nothing imports a command", from, to)
			}
			for _, n := range never {
				if (from == n.from || n.from == "restore" && strings.HasPrefix(from, "restore/")) &&
					(to == n.to || n.to == "restore" && strings.HasPrefix(to, "restore/")) {
					t.Errorf("%s imports %s: %s", from, to, n.why)
				}
			}
			if below := slices.Contains([]string{"uffd", "bpf"}, strings.SplitN(from, "/", 2)[0]); below &&
				!strings.HasPrefix(to, "uffd") && !strings.HasPrefix(to, "bpf") {
				t.Errorf("%s imports %s: it knows nothing above it", from, to)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	for _, p := range packages(t) {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		documented := false
		for _, name := range files {
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || f.Doc != nil && len(f.Doc.Text()) > 40
		}
		if !documented {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}
