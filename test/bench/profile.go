package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/test/bench/flame"
	"github.com/missiu/missiu/test/bench/report"
	"github.com/missiu/missiu/test/bench/traffic"
	"github.com/missiu/missiu/test/e2e/lab"
)

// profile puts missiu under load and draws where its time goes, for the sending
// and the receiving gateway.
func profile(args []string) error {
	f := flag.NewFlagSet("bench profile", flag.ContinueOnError)
	var (
		id      = f.String("system", report.Missiu, "which missiu, as --systems of bench names it")
		load    = f.String("load", "tcp1", "tcp1, tcp4, udp1400 or udp64")
		rate    = f.Float64("rate", 0, "datagrams a second (0: as many as go)")
		seconds = f.Int("seconds", 5, "length")
		out     = f.String("o", "", "`file`; -a.svg (sender) and -b.svg (receiver) are added (default: below results/)")
	)
	if err := flags(f, args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	i := slices.IndexFunc(systems, func(s system) bool { return s.ID == *id && strings.HasPrefix(s.ID, report.Missiu) })
	switch {
	case i < 0:
		return fmt.Errorf("%w: %q is no missiu", errUsage, *id)
	case !slices.Contains(works[:4], *load):
		return fmt.Errorf("%w: --load %q; want %s", errUsage, *load, strings.Join(works[:4], ", "))
	case os.Geteuid() != 0:
		return errors.New("needs root: makes network namespaces")
	}
	if *out == "" {
		root, err := lab.Root()
		if err != nil {
			return err
		}
		*out = filepath.Join(root, "results", "profile-"+*id+"-"+*load)
	}
	return lab.Stage(func(t lab.TB) {
		in, err := startInstance(&systems[i], report.Setting{Family: 4, Offload: true}, "--cpuprofile", "cpu.pprof")
		t.Cleanup(in.t.End)
		if err == nil {
			err = in.load(*load, *rate, time.Duration(*seconds)*time.Second)
		}
		if err != nil {
			t.Fatalf("%v", err)
		}
		for j, x := range in.both() {
			in.procs[j].Stop() // missiu writes the profile
			path := *out + "-" + string("ab"[j]) + ".svg"
			if err := draw(path, fmt.Sprintf("%s, %s, %s", systems[i].Title, *load, [2]string{"sender", "receiver"}[j]), x.Path(filepath.Join(x.Dir, "cpu.pprof"))); err != nil {
				t.Fatalf("%v", err)
			}
			fmt.Println(path)
		}
	})
}

// load sends as a work does.
func (in *instance) load(kind string, rate float64, d time.Duration) error {
	switch kind {
	case "tcp1", "tcp4":
		var sent traffic.TCPSent
		return in.client[0].Call("Agent.TCPSend", traffic.TCPSend{To: in.b.inner, Streams: int(kind[3] - '0'), Duration: d}, &sent)
	case "udp64":
		_, err := in.udp(64, rate, d)
		return err
	default:
		_, err := in.udp(in.payload(1400), rate, d)
		return err
	}
}

// draw makes a flame graph of a CPU profile. Go's own tool reads the format.
func draw(path, title, profile string) error {
	var out, msg bytes.Buffer
	cmd := exec.Command("go", "tool", "pprof", "-traces", profile)
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go tool pprof: %w\n%s", err, &msg)
	}
	stacks, err := flame.Parse(&out)
	if err != nil {
		return fmt.Errorf("go tool pprof -traces: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(flame.SVG(f, title, stacks), f.Close())
}
