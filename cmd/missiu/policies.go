package main

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keyengine"
)

// settle is how long the policies rest before they are saved: files of many
// entries and strangers' daemons change them one by one.
const settle = 50 * time.Millisecond

// recorder keeps the policies of the key engine in a file.
type recorder struct {
	keys    *keyengine.Engine
	changed chan struct{}
}

func newRecorder(e *keyengine.Engine) *recorder { return &recorder{e, make(chan struct{}, 1)} }

// note tells of a change.
func (r *recorder) note() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// restore puts the policies of a killed predecessor in force again.
func (r *recorder) restore(ps []ipsec.Policy) error {
	for i := range ps {
		if _, err := r.keys.AddPolicy(0, &ps[i]); err != nil {
			return err
		}
	}
	return nil
}

// save writes the policies to the state file whenever they have changed.
func (r *recorder) save(ctx context.Context, ifname string, do func(func()), log *zap.Logger) {
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
		got := make(chan []ipsec.Policy, 1)
		do(func() {
			infos := r.keys.Policies(0)
			ps := make([]ipsec.Policy, len(infos))
			for i, p := range infos {
				ps[i] = p.Policy
			}
			got <- ps
		})
		select {
		case <-ctx.Done():
			return
		case ps := <-got:
			if err := savePolicies(ifname, ps); err != nil {
				log.Error("policies not saved: after a crash they would be missing", zap.Error(err))
			}
		}
	}
}
