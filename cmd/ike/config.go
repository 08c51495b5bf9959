package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/config/ikeconf"
	"github.com/missiu/missiu/pkg/ike"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"go.uber.org/zap/zapcore"
)

// configuration is what the command line and the files come to.
type configuration struct {
	rules             *pad.DB
	limits            ike.Limits
	ikePort, nattPort uint16
	level             zapcore.Level
	shown             string // of -show
}

// loader reads the configuration, at start and on HUP.
type loader struct {
	o     *options
	stdin io.Reader
	warn  func(string)
	psk   ipsec.Key // of -p @- or -p KEY, which can be read only once
	have  bool
}

// load returns a configuration, or an error whose lines are for the operator.
func (l *loader) load() (*configuration, error) {
	c := &configuration{level: zapcore.InfoLevel}
	var rules []*pad.Rule
	file := l.o.file
	if !l.o.fileGiven && file != "" {
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			if l.o.secretOpt == "" {
				return nil, fmt.Errorf("ike: %s: no such file; use -f FILE or -p @FILE", file)
			}
			file = "" // -P without a default file: the rule of the command line alone
		}
	}
	if file != "" {
		var err error
		if rules, err = l.readFile(file, c); err != nil {
			return nil, err
		}
	}
	if l.o.secretOpt != "" {
		r, err := l.commandLine()
		if err != nil {
			return nil, fmt.Errorf("ike: %s: %w", l.o.secretOpt, err)
		}
		rules = append(rules, r)
		if l.o.show {
			c.shown += fmt.Sprintf("\n# and the rule of the command line, with its key for any identity, for %v\n", r.Remote)
		}
	}
	db, err := pad.NewDB(rules)
	if err != nil {
		return nil, fmt.Errorf("ike: %w", err)
	}
	c.rules = db
	return c, nil
}

// readFile reads ike.conf and its secrets.
func (l *loader) readFile(path string, c *configuration) ([]*pad.Rule, error) {
	conf, ds := ikeconf.Parse(ikeconf.OS{}, path, "", l.o.parameters())
	if conf != nil {
		defer conf.Wipe() // rules have keys of their own
		ds = append(ds, ikeconf.Unsupported(conf)...)
		ds = append(ds, conf.Load(ikeconf.OS{}, time.Now())...)
	}
	if ikeconf.Failed(ds) {
		lines := make([]string, len(ds))
		for i, d := range ds {
			lines[i] = d.String()
		}
		return nil, errors.New(strings.Join(lines, "\n"))
	}
	for _, d := range ds {
		l.warn(d.String())
	}
	c.limits = ike.Limits{
		CookieThreshold: conf.CookieThreshold, AlwaysCookie: conf.CookieThreshold == 0,
		HalfOpen: conf.HalfOpen, HalfOpenPerSource: conf.HalfOpenPerSource, Expire: conf.Expire,
	}
	c.ikePort, c.nattPort = conf.IKEPort, conf.NATTPort
	if l.o.show {
		c.shown = conf.Show()
	}
	if err := c.level.UnmarshalText([]byte(conf.LogLevel)); err != nil {
		return nil, fmt.Errorf("%s: log_level: %w", path, err)
	}
	return conf.Rules(l.o.local), nil
}

// parameters gives the values of the command line in the language of the file.
func (o *options) parameters() string {
	var ps []string
	add := func(keyword string, d time.Duration) {
		ps = append(ps, fmt.Sprintf("%s %d", keyword, d/time.Second))
	}
	if o.ikeLife != 0 {
		add("ikesa_lifetime_secs", o.ikeLife)
	}
	if o.childLife != 0 {
		add("childsa_lifetime_secs", o.childLife)
	}
	if o.dpdSet {
		add("dpd_secs", o.dpd)
	}
	return strings.Join(ps, " ")
}

// commandLine makes the rule of -p: any identity that has the key.
func (l *loader) commandLine() (*pad.Rule, error) {
	key := l.psk
	if !l.have {
		var err error
		if key, err = l.readKey(); err != nil {
			return nil, err
		}
		if key.Len() < 16 {
			l.warn(fmt.Sprintf("ike: warning: %s: fewer than 16 octets", l.o.secretOpt))
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
	if l.o.groups != nil {
		for i := range r.Proposals {
			r.Proposals[i].KE = l.o.groups
			r.Proposals[i].AddKE = nil // what is asked for, and nothing else
		}
		r.Proposals = slices.CompactFunc(r.Proposals, func(a, b proposal.IKE) bool { return reflect.DeepEqual(a, b) })
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

// readKey takes the key of -p: @FILE, @- or, for old scripts, the key itself.
// Errors never quote it.
func (l *loader) readKey() (key ipsec.Key, err error) {
	name, isFile := strings.CutPrefix(l.o.secret, "@")
	switch {
	case !isFile:
		l.warn(fmt.Sprintf("ike: warning: %s: key is visible to every user; use %s @FILE", l.o.secretOpt, l.o.secretOpt))
		key, err = ikeconf.ParseKey([]byte(l.o.secret))
	case name == "-":
		var b []byte
		b, err = io.ReadAll(io.LimitReader(l.stdin, ikeconf.MaxFile+1))
		defer clear(b)
		if err == nil && len(b) > ikeconf.MaxFile {
			err = errors.New("larger than 1 MiB")
		}
		if err == nil {
			key, err = ikeconf.ParseKey(b)
		}
	default:
		if key, err = ikeconf.ReadKey(ikeconf.OS{}, name); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		return key, err
	}
	// Neither can be read again on HUP.
	if err == nil {
		l.psk, l.have = key, true
	}
	return key, err
}
