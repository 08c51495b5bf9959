package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keyengine"
	"github.com/missiu/missiu/pkg/keysock"
)

// The policies in force are kept in a file while the daemon runs. One that was
// killed leaves it behind, and the next one starts with them: an instance that
// adopts the routes of its predecessor with an empty SPD would send in clear
// what they protect. An orderly stop removes the file. There are no keys in it.
//
// It is a tape (keysock.ReadTape). What changes is appended, so that one policy
// of a hundred thousand costs what one alone does; when many have changed, or the
// tape has grown long, it is written anew and takes the old one's place in one
// step.

const (
	// settle is how long the policies rest before they are saved: files of many
	// entries and strangers' daemons change them one by one.
	settle = 50 * time.Millisecond
	// retry is after how long it is tried again to save them.
	retry = time.Second
	// manyChanges make the tape new rather than longer.
	manyChanges = 1000
	// tapeGrowth is by how many octets a tape may become longer than twice what
	// it was when it was new.
	tapeGrowth = 1 << 20
)

// recorder keeps the policies of the key engine in a file.
type recorder struct {
	keys    *keyengine.Engine
	path    string
	changed chan struct{}

	mu      sync.Mutex
	pending []spd.Change // not on the tape yet
	anew    bool         // there were too many

	// Of save.
	tape       *os.File // nil: none of ours
	size, base int      // octets of it, and of it when it was new
}

func newRecorder(e *keyengine.Engine, ifname string) *recorder {
	return &recorder{keys: e, path: statePath(ifname), changed: make(chan struct{}, 1)}
}

// note tells of changes. For the goroutine of the key engine.
func (r *recorder) note(l []spd.Change) {
	r.mu.Lock()
	if r.anew = r.anew || len(r.pending)+len(l) > manyChanges; r.anew {
		r.pending = nil
	} else {
		r.pending = append(r.pending, l...)
	}
	r.mu.Unlock()
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// take returns what is to be appended; false: all is to be written anew.
func (r *recorder) take() ([]spd.Change, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.anew || r.tape == nil || r.size > 2*r.base+tapeGrowth {
		return nil, false
	}
	l := r.pending
	r.pending = nil
	return l, true
}

// all returns all policies, in an order that gives them their places among equals
// when they are added again, and keeps them when a priority changes later. For the
// goroutine of the key engine.
func (r *recorder) all() []*ipsec.Policy {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending, r.anew = nil, false
	return r.keys.RulesByAge()
}

// restore puts the policies of a killed predecessor in force again, if there are
// any. Before the server of the key engine serves.
func (r *recorder) restore() error {
	b, err := os.ReadFile(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = r.keys.Begin(0)
	}
	if err != nil {
		return err
	}
	n, err := play(b, r.keys)
	if err != nil {
		return errors.Join(fmt.Errorf("%s: %w", r.path, err), r.keys.Abort(0))
	}
	if err := r.keys.Commit(0); err != nil || n == 0 {
		return err
	}
	return r.resume(n)
}

// resume has the tape that is there extended behind its first n octets.
func (r *recorder) resume(n int) (err error) {
	if err := os.Truncate(r.path, int64(n)); err != nil {
		return err
	}
	r.tape, err = os.OpenFile(r.path, os.O_WRONLY|os.O_APPEND, 0)
	r.size, r.base = n, n
	return err
}

// play makes the changes of a record in connection 0's transaction; it returns
// how many octets of a tape count, 0 if it is none.
func play(b []byte, e *keyengine.Engine) (int, error) {
	if len(b) > 0 && b[0] == '[' { // of an earlier version
		var ps []ipsec.Policy
		err := json.Unmarshal(b, &ps)
		for i := 0; i < len(ps) && err == nil; i++ {
			_, err = e.AddPolicy(0, &ps[i])
		}
		return 0, err
	}
	return keysock.ReadTape(b, func(c *keysock.Taped) (err error) {
		if c.Removed {
			_, err = e.DeletePolicy(0, c.Policy.Dir, c.Policy.Sel)
		} else {
			_, err = e.UpdatePolicy(0, &c.Policy)
		}
		return err
	})
}

// save writes the policies to the file whenever they have changed. do has a
// function called by the goroutine of the key engine.
func (r *recorder) save(ctx context.Context, do func(func()), log *zap.Logger) {
	defer r.close()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.changed:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(settle):
		}
		l, ok := r.take()
		var err error
		if ok {
			err = r.extend(l)
		} else {
			got := make(chan []*ipsec.Policy, 1)
			do(func() { got <- r.all() })
			select {
			case <-ctx.Done():
				return
			case ps := <-got:
				err = r.renew(ps)
			}
		}
		if err != nil {
			log.Error("policies not saved: after a crash they would be missing", zap.Error(err))
			r.close() // what is in it is unknown
			time.AfterFunc(retry, func() { r.note(nil) })
		}
	}
}

// close is for a tape that is not extended any more.
func (r *recorder) close() {
	if r.tape != nil {
		r.tape.Close()
		r.tape = nil
	}
}

// extend appends changes to the tape.
func (r *recorder) extend(l []spd.Change) (err error) {
	if len(l) == 0 {
		return nil
	}
	var b []byte
	for i := range l {
		t := keysock.Taped{Removed: l[i].Added == nil}
		if t.Removed {
			t.Policy = l[i].Removed.P
		} else {
			t.Policy = l[i].Added.P
		}
		if b, err = keysock.AppendTaped(b, &t); err != nil {
			return err
		}
	}
	if b, err = keysock.AppendTapeEnd(b); err != nil {
		return err
	}
	n, err := r.tape.Write(b)
	r.size += n
	return err
}

// renew makes a tape of ps alone.
func (r *recorder) renew(ps []*ipsec.Policy) error {
	r.close()
	f, err := os.OpenFile(r.path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	r.tape, r.size = f, 0
	w := bufio.NewWriterSize(f, 64<<10)
	var b []byte
	put := func(m []byte, err error) error {
		if err == nil {
			_, err = w.Write(m)
		}
		b, r.size = m[:0], r.size+len(m)
		return err
	}
	for _, p := range ps {
		if err := put(keysock.AppendTaped(b, &keysock.Taped{Policy: *p})); err != nil {
			return err
		}
	}
	err = put(keysock.AppendTapeEnd(b))
	r.base = r.size
	if err := errors.Join(err, w.Flush()); err != nil {
		return err
	}
	return os.Rename(r.path+".new", r.path)
}
