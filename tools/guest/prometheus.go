package guest

import (
	"context"
	"os"
	"path/filepath"

	"github.com/ckagent/ckagent/agent/problem"
)

// Monitoring is Prometheus and its tool, unpacked and never installed: the package's
// service would listen on every interface.
type Monitoring struct {
	Prometheus, Promtool string
}

// Prometheus returns the distribution's Prometheus, fetched if it is not there yet.
func Prometheus(ctx context.Context) (Monitoring, error) {
	r, err := currentRelease()
	if err != nil {
		return Monitoring{}, err
	}
	dir, err := artifact(ctx, "prometheus", stamp([]byte(recipe), []byte(r.codename)), func(dir string) error {
		a, err := openApt()
		if err != nil {
			return err
		}
		root := filepath.Join(dir, "root")
		if err := a.unpack(ctx, root, "prometheus"); err != nil {
			return err
		}
		for _, name := range []string{"prometheus", "promtool"} {
			if err := os.Rename(filepath.Join(root, "usr/bin", name), filepath.Join(dir, name)); err != nil {
				return problem.New(problem.Failed, "unpack", "prometheus", "%w", err)
			}
		}
		return os.RemoveAll(root)
	})
	if err != nil {
		return Monitoring{}, err
	}
	return Monitoring{Prometheus: filepath.Join(dir, "prometheus"), Promtool: filepath.Join(dir, "promtool")}, nil
}
