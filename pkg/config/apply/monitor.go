package apply

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// Watched is what Monitor uses of a keysock.Client.
type Watched interface {
	Register(ctx context.Context, protos ...ipsec.Protocol) (keysock.Supported, error)
	Events() <-chan keysock.Event
}

// Monitor writes a line for each event until ctx ends, which is no error, or the
// connection does. Events carry no keys.
func Monitor(ctx context.Context, c Watched, w io.Writer, asJSON bool) error {
	if _, err := c.Register(ctx); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-c.Events():
			if !ok {
				return errors.New("missiu has gone")
			}
			if err := writeEvent(w, time.Now(), e, asJSON); err != nil {
				return err
			}
		}
	}
}

// jsonEvent is an event for other programs. Fields are only ever added.
type jsonEvent struct {
	Time  time.Time `json:"time"`
	Event string    `json:"event"`
	Text  string    `json:"text"`
}

func writeEvent(w io.Writer, now time.Time, e keysock.Event, asJSON bool) error {
	name, text := describe(e)
	now = now.UTC().Truncate(time.Millisecond)
	if asJSON {
		b, err := json.Marshal(jsonEvent{now, name, text})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", b)
		return err
	}
	_, err := fmt.Fprintf(w, "%s %s %s\n", now.Format("2006-01-02T15:04:05.000Z"), name, text)
	return err
}

// describe gives an event's name and the rest of its line.
func describe(e keysock.Event) (name, text string) {
	sa := func(id ipsec.SAID, src fmt.Stringer) string {
		return fmt.Sprintf("%v %v -> %v spi %v", id.Proto, src, id.Dst, id.SPI)
	}
	policy := func(p *ipsec.Policy) string {
		entry, _ := ipsecconf.Format(p)
		return fmt.Sprintf("id %d priority %d %s", p.ID, p.Priority, entry)
	}
	switch e := e.(type) {
	case keysock.Acquire:
		text = fmt.Sprintf("%v %v -> %v %v policy %d reqid %d seq %d", e.Proto, e.Src, e.Dst, e.Mode, e.PolicyID, e.ReqID, e.Seq)
		if e.Flow != nil {
			text += fmt.Sprintf(" for %v", *e.Flow)
		}
		return "acquire", text
	case keysock.Expire:
		kind := "soft"
		if e.Hard {
			kind = "hard"
		}
		return "expire", fmt.Sprintf("%s %s reqid %d", kind, sa(e.SAID, e.Src), e.ReqID)
	case keysock.NewMapping:
		return "mapping", fmt.Sprintf("spi %v peer %v, was %v", e.SAID.SPI, e.New, e.Old)
	case keysock.SAAdded:
		return "sa-added", fmt.Sprintf("%s %v reqid %d", sa(e.SAID, e.Src), e.Mode, e.ReqID)
	case keysock.SADeleted:
		return "sa-deleted", sa(e.SAID, e.Src)
	case keysock.SAsFlushed:
		if e.Proto == 0 {
			return "sas-flushed", "all"
		}
		return "sas-flushed", e.Proto.String()
	case keysock.PolicyAdded:
		return "policy-added", policy(&e.Policy)
	case keysock.PolicyDeleted:
		return "policy-deleted", policy(&e.Policy)
	case keysock.PoliciesFlushed:
		return "policies-flushed", "all"
	case keysock.PoliciesChanged:
		return "policies-changed", "a file was loaded, or end points have moved"
	case keysock.Lost:
		return "lost", fmt.Sprintf("%d events, not read in time", e.N)
	}
	return "event", fmt.Sprintf("%T", e)
}
