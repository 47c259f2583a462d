package restore

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/restore/plan"
)

// maxInclude bounds a configuration file that the command line includes.
const maxInclude = 1 << 20

// MakePlan rebuilds the command line of a checkpoint without doing anything; it is
// what --dry-run shows. The run directory is the one a restore by this process
// would use.
func MakePlan(m *image.Manifest, o Options) (*plan.Plan, error) {
	o.fill()
	o.nameClone()
	o.nameDisks(m)
	if err := judgeDisks(m, o.Disks); err != nil {
		return nil, err
	}
	return makePlan(m, o, runDirName(o.RunRoot, m.VM))
}

func makePlan(m *image.Manifest, o Options, runDir string) (*plan.Plan, error) {
	rec := recorded(m)
	rec.Disks = planDisks(m, o.Disks)
	p, err := plan.Build(rec, plan.Options{
		Map: o.Map, Secrets: o.Secrets, Extra: o.Extra, Binary: o.Binary, QMPPath: o.QMPPath,
		RunDir: runDir, DiskDir: o.DiskDir, CloneID: o.CloneID,
		ReadFile: func(name string) ([]byte, error) {
			if !filepath.IsAbs(name) {
				name = filepath.Join(rec.Cwd, name)
			}
			st, err := os.Stat(name)
			if err != nil {
				return nil, err
			}
			if !st.Mode().IsRegular() || st.Size() > maxInclude {
				return nil, fmt.Errorf("%s: not a file of at most %d bytes", name, maxInclude)
			}
			return os.ReadFile(name)
		},
	})
	if err != nil {
		return nil, err
	}
	p.Paused = p.Paused || o.Paused
	return p, nil
}

func (o *Options) nameClone() {
	if o.Clone && o.CloneID == "" {
		var b [4]byte
		rand.Read(b[:]) // never fails
		o.CloneID = hex.EncodeToString(b[:])
	}
	if !o.Clone {
		o.CloneID = ""
	}
}
