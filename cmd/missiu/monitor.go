package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/daemon"
)

// sideNames are the words for the sides on the command line.
var sideNames = map[string]capture.Sides{"low": capture.OnlyLow, "high": capture.OnlyHigh}

// monitor prints the frames that pass a running instance, or writes them to a
// file, until there were enough, a signal comes or the instance ends.
func monitor(o *options, words []string, stdout, stderr io.Writer) error {
	sides := capture.Both
	if len(words) > 0 {
		sides = sideNames[words[0]]
	}
	ctx, cancel := daemon.Signals(context.Background(), nil)
	defer cancel()
	r, err := capture.Dial(ctx, attach.Path(o.ifname, capture.Purpose), sides)
	if gone(err) {
		err = absent(o.ifname)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.ifname, err)
	}
	defer r.Close()
	show, done, err := o.sink(r, stdout)
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "missiu: %s: monitoring\n", o.ifname)
	frames, lost := 0, uint64(0)
	for frames < o.count || o.count == 0 {
		f, e := r.Read()
		if e != nil {
			if ctx.Err() == nil {
				err = fmt.Errorf("%s: missiu has ended", o.ifname)
				if !errors.Is(e, io.EOF) {
					err = fmt.Errorf("%s: %w", o.ifname, e)
				}
			}
			break
		}
		frames++
		lost += uint64(f.Lost)
		if err = show(&f); err != nil {
			break
		}
	}
	err = errors.Join(err, done())
	fmt.Fprintf(stderr, "missiu: %s: %d frames, %d lost\n", o.ifname, frames, lost)
	return err
}

// sink is where frames go: lines to standard output, or blocks to a file, which
// is its owner's only, since it shows clear text. done ends it.
func (o *options) sink(r *capture.Reader, stdout io.Writer) (show func(*capture.Frame) error, done func() error, err error) {
	if o.write == "" {
		return func(f *capture.Frame) error {
			if f.Lost != 0 {
				fmt.Fprintf(stdout, "%d frames lost\n", f.Lost)
			}
			_, err := fmt.Fprintln(stdout, f.Line(r.Interface(f.Side).Link))
			return err
		}, func() error { return nil }, nil
	}
	w, end := stdout, func() error { return nil }
	if o.write != "-" {
		f, err := os.OpenFile(o.write, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, nil, err
		}
		if err := f.Chmod(0o600); err != nil {
			f.Close()
			return nil, nil, err
		}
		w, end = f, f.Close
	}
	b := bufio.NewWriter(w)
	p, err := capture.NewWriter(b, "missiu "+buildVersion(), r.Sides(), r.Interface)
	if err == nil {
		err = b.Flush()
	}
	if err != nil {
		return nil, nil, errors.Join(err, end())
	}
	// Flushed frame by frame, so that others can read along.
	show = func(f *capture.Frame) error { return errors.Join(p.Write(f), b.Flush()) }
	done = func() error { return errors.Join(p.Close(r.Sides()), b.Flush(), end()) }
	return show, done, nil
}
