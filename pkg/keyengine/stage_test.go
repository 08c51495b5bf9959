package keyengine

import (
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

func (r *rig) stage(conn uint64, v keysock.SAVerb, p *ipsec.SAParams) (i *keysock.SAInfo, err error) {
	r.do(func() { i, err = r.StageSA(conn, keysock.SAChange{Verb: v, P: p}) })
	return i, err
}

// A transaction changes SAs at its end or not at all; until then what is in
// force stays, with its sequence numbers.
func TestStageSA(t *testing.T) {
	testRig(t, func(r *rig) {
		begin := func() {
			r.Helper()
			r.do(func() {
				if err := r.Begin(1); err != nil {
					r.Fatal(err)
				}
			})
		}
		stage := func(v keysock.SAVerb, p *ipsec.SAParams, want syscall.Errno) {
			r.Helper()
			_, err := r.stage(1, v, p)
			if want != 0 {
				r.errno(err, want)
			} else if err != nil {
				r.Errorf("%d %v: %v", v, p.SAID, err)
			}
		}
		end := func(f func(uint64) error, want syscall.Errno) {
			r.Helper()
			r.do(func() {
				if err := f(1); want != 0 {
					r.errno(err, want)
				} else if err != nil {
					r.Error(err)
				}
			})
		}
		old := r.mustAdd(outSA(0x1000, 7))
		old.NextSeq(41)
		kept := r.mustAdd(outSA(0x1001, 7))
		other := func() *ipsec.SAParams {
			p := outSA(0x1000, 8)
			p.EncrKey = key(36)
			return p
		}
		longer := func(spi ipsec.SPI) *ipsec.SAParams {
			p := outSA(spi, 7)
			p.Hard.AddTime = time.Hour
			return p
		}
		stage(keysock.SAAdd, outSA(0x2000, 0), syscall.EINVAL) // no transaction
		for _, f := range []func(uint64) error{r.Abort, r.Commit} {
			begin()
			stage(keysock.SAAdd, other(), syscall.EEXIST)
			stage(keysock.SADelete, outSA(0x1000, 7), 0)
			stage(keysock.SADelete, outSA(0x1000, 7), syscall.ESRCH)
			bad := other()
			bad.EncrKey = key(19)
			stage(keysock.SAAdd, bad, syscall.EINVAL)
			stage(keysock.SAAdd, other(), 0)
			stage(keysock.SAAdd, other(), syscall.EEXIST)
			stage(keysock.SAUpdate, other(), syscall.EINVAL) // changed before
			stage(keysock.SAUpdate, longer(0x1001), 0)
			stage(keysock.SAUpdate, longer(0x1009), syscall.ESRCH)
			stage(keysock.SAAdd, outSA(0x2000, 7), 0)
			stage(keysock.SADelete, outSA(0x2000, 7), 0) // never to be
			stage(keysock.SAAdd, outSA(0x2001, 7), 0)
			if _, err := r.stage(2, keysock.SAAdd, outSA(0x2002, 7)); err == nil {
				r.Error("another connection stages")
			}
			if r.o.SAD.Lookup(old.P.SAID) != old || r.o.SAD.Len() != 2 {
				r.Fatal("the SAD changed before the end")
			}
			end(f, 0)
			if r.o.SAD.Lookup(kept.P.SAID) != kept {
				r.Error("the SA with new limits is another")
			}
			if n, _ := old.NextSeq(1); n != 42 && r.o.SAD.Lookup(old.P.SAID) == old {
				r.Errorf("sequence number %d after an abort, want 42", n)
			}
		}
		if s := r.o.SAD.Lookup(old.P.SAID); s == old || s == nil || s.P.ReqID != 8 || r.o.SAD.Len() != 3 {
			r.Errorf("after the commit %v, %d SAs", s, r.o.SAD.Len())
		}
		if i, err := r.Get(kept.P.SAID, self); err != nil || i.Hard.AddTime != time.Hour {
			r.Errorf("limits %v, %v", i, err)
		}
		// What others do in between makes it void, as a whole.
		begin()
		stage(keysock.SAAdd, outSA(0x3000, 7), 0)
		stage(keysock.SAAdd, outSA(0x3001, 7), 0)
		r.mustAdd(outSA(0x3001, 9))
		end(r.Commit, syscall.EEXIST)
		begin()
		stage(keysock.SAUpdate, longer(0x1001), 0)
		r.do(func() { r.Delete(kept.P.SAID, self) })
		end(r.Commit, syscall.ESRCH)
		if r.o.SAD.Lookup(ipsec.SAID{Proto: ipsec.ESP, Dst: peer, SPI: 0x3000}) != nil {
			r.Error("a part of a transaction that failed")
		}
		// Deleting what has gone meanwhile is no failure.
		begin()
		stage(keysock.SADelete, outSA(0x3001, 9), 0)
		r.do(func() { r.Flush(0) })
		end(r.Commit, 0)
	})
}
