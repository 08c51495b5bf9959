package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/missiu/missiu/pkg/ike"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"go.uber.org/zap/zapcore"
)

// configuration is what the command line and the files come to.
type configuration struct {
	rules             *pad.DB
	limits            ike.Limits
	ikePort, nattPort uint16
	level             zapcore.Level
}

// loader reads the configuration, at start and on HUP.
type loader struct {
	o     *options
	stdin io.Reader
	warn  func(string)
	psk   ipsec.Key // of -p @-, which can be read only once
	have  bool
}

// load returns a configuration or an error whose lines are for the operator.
func (l *loader) load() (*configuration, error) {
	c := &configuration{level: zapcore.InfoLevel}
	var rules []*pad.Rule
	if l.o.file != "" {
		switch _, err := os.Stat(l.o.file); {
		case errors.Is(err, fs.ErrNotExist) && !l.o.fileGiven && l.o.secretOpt == "":
			return nil, fmt.Errorf("ike: %s: no such file; use -f FILE or -p @FILE", l.o.file)
		case errors.Is(err, fs.ErrNotExist) && !l.o.fileGiven:
			// -P with no default file: the rule of the command line alone.
		default:
			return nil, fmt.Errorf("ike: %s: configuration files are not supported yet; use -p @FILE", l.o.file)
		}
	}
	if l.o.secretOpt != "" {
		r, err := l.commandLine()
		if err != nil {
			return nil, fmt.Errorf("ike: %s: %w", l.o.secretOpt, err)
		}
		rules = append(rules, r)
	}
	db, err := pad.NewDB(rules)
	if err != nil {
		return nil, fmt.Errorf("ike: %w", err)
	}
	c.rules = db
	return c, nil
}

// commandLine makes the rule of -p: any identity that has the key.
func (l *loader) commandLine() (*pad.Rule, error) {
	key := l.psk
	if !l.have {
		k, visible, err := readSecret(l.o.secret, l.stdin)
		if err != nil {
			return nil, err
		}
		if visible {
			l.warn(fmt.Sprintf("ike: warning: %s: key is visible to every user; use %s @FILE", l.o.secretOpt, l.o.secretOpt))
		}
		if k.Len() < 16 {
			l.warn(fmt.Sprintf("ike: warning: %s: fewer than 16 octets", l.o.secretOpt))
		}
		key = k
		// Standard input cannot be read again; a key on the command line need not.
		if l.o.secret == "@-" || visible {
			l.psk, l.have = k, true
		}
	}
	r := pad.NewRule("command line")
	r.PSK = pad.Keys{Local: key, Remote: key}
	r.RemoteIDs = pad.Patterns{pad.AnyID}
	r.Remote = pad.Any()
	if len(l.o.connect) > 0 {
		r.Remote = nil
		for _, p := range l.o.connect {
			r.Remote = append(r.Remote, pad.One(p))
		}
	}
	if l.o.ikeLife != 0 {
		r.SetIKELife(l.o.ikeLife)
	}
	if l.o.childLife != 0 {
		r.SetChildLife(l.o.childLife)
	}
	if l.o.dpdSet {
		r.DPD = l.o.dpd
	}
	return r, nil
}
