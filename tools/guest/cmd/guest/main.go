// Command guest builds a guest, if the cache has none yet, and prints where it
// is, one name=path a line.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/tools/guest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(problem.ExitCode(err))
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return problem.New(problem.Usage, "guest", "", "say what to build").
			WithHint("guest linux|sqlite|mini|qemu10|ovmf|prometheus ...")
	}
	var errs []error
	for _, what := range args {
		switch what {
		case "linux":
			image, err := guest.Linux(ctx)
			errs = append(errs, err)
			if err == nil {
				fmt.Printf("kernel=%s\nbzimage=%s\ninitrd=%s\n", image.Kernel, image.BzImage, image.Initrd)
			}
		case "sqlite":
			image, err := guest.SQLite(ctx)
			errs = append(errs, err)
			if err == nil {
				fmt.Printf("sqlite_initrd=%s\n", image.Initrd)
			}
		case "mini":
			path, err := guest.Mini(ctx)
			errs = append(errs, err)
			if err == nil {
				fmt.Printf("mini=%s\n", path)
			}
		case "qemu10":
			q, err := guest.QEMU10(ctx)
			errs = append(errs, err)
			if err == nil {
				fmt.Printf("binary=%s\nenv=%s\nargs=%s\n", q.Binary, strings.Join(q.Env, " "), strings.Join(q.Args, " "))
			}
		case "ovmf":
			fw, err := guest.OVMF(ctx)
			errs = append(errs, err)
			if err == nil {
				fmt.Printf("code=%s\nvars=%s\n", fw.Code, fw.Vars)
			}
		case "prometheus":
			m, err := guest.Prometheus(ctx)
			errs = append(errs, err)
			if err == nil {
				fmt.Printf("prometheus=%s\npromtool=%s\n", m.Prometheus, m.Promtool)
			}
		default:
			errs = append(errs, problem.New(problem.Usage, "build guest", what, "no such guest").
				WithHint("guest linux|sqlite|mini|qemu10|ovmf|prometheus ..."))
		}
	}
	return errors.Join(errs...)
}
