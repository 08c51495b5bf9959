// Package ikeconf reads ike's own files: the configuration, ike.conf, which
// says with whom and how keys are agreed (the Peer Authorization Database of
// RFC 4301, 4.4.3), and the secrets, ike.secrets. What traffic is protected
// stands in neither; that is the policy language's business.
//
// Reading has three steps: tokens (scan.go), grammar by a table of keywords
// (keywords.go, parse.go, value.go), meaning (check.go). The whole language is
// understood and checked. What ike cannot do yet is told by Unsupported; who
// starts a daemon from a configuration must ask it, and then call Load, which reads
// the certificates and keys that rules name.
//
// For cmd/ike and pkg/ike. A Config is not changed once made, except by Wipe.
package ikeconf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Where the files are when nobody says otherwise.
const (
	DefaultConf    = "/etc/missiu/ike.conf"
	DefaultSecrets = "/etc/missiu/ike.secrets"
)

// Sizes in octets above which a file is refused: the configuration and the secrets,
// which have room for tens of thousands of rules, and all others but CRLs.
const (
	MaxConf = 16 << 20
	MaxFile = 1 << 20
)

// Files is how Parse reaches files. FileInfo.Sys of what it opens gives a
// *syscall.Stat_t, from which the owner is taken; without one the owner is not
// checked.
type Files interface {
	Open(name string) (fs.File, error)
	// UID is the effective user, who must own secrets.
	UID() int
}

// OS is the file system of this machine.
type OS struct{}

// Open opens a file without ever waiting for the writer of a pipe.
func (OS) Open(name string) (fs.File, error) {
	return os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// UID returns the effective user.
func (OS) UID() int { return os.Geteuid() }

// Config is what both files say, free of errors.
type Config struct {
	Path, SecretsPath string // as read

	IKEPort, NATTPort uint16
	// Half-open IKE SAs: above CookieThreshold cookies are demanded, 0 always;
	// at most HalfOpen of them, HalfOpenPerSource of one source; each has Expire.
	CookieThreshold, HalfOpen, HalfOpenPerSource int
	Expire                                       time.Duration
	LogLevel                                     string // debug, error, info or warn

	doc     *document
	rules   []*rule
	labels  map[string]bool
	secrets []*secret
	bare    bool                 // of ParseRules
	byLabel map[string][]*secret // pre-shared keys
	pools   map[string]*pad.Pool // made so far
}

// Parse reads a configuration and its secrets. An empty secretsPath means what
// the configuration says, else DefaultSecrets. The secrets may be missing if no
// rule needs them. override has values from the command line: parameters of the top
// level in the language of the file, as "dpd_secs 5m childsa_lifetime_secs 2h".
// They replace those of the file; what a rule says itself still wins. The Config is
// nil if there is an error among the diagnostics, which are sorted by file and place.
func Parse(fsys Files, confPath, secretsPath, override string) (*Config, []Diagnostic) {
	return parseAll(fsys, confPath, secretsPath, override, true)
}

// ParseRules is Parse without the secrets, for whoever only asks what the
// rules say: no key is missed, none is had, and rules with certificates come
// without them.
func ParseRules(fsys Files, confPath, override string) (*Config, []Diagnostic) {
	return parseAll(fsys, confPath, "", override, false)
}

func parseAll(fsys Files, confPath, secretsPath, override string, withSecrets bool) (*Config, []Diagnostic) {
	l := newList(confPath)
	src, err := read(fsys, confPath, public, MaxConf)
	if err != nil {
		return nil, []Diagnostic{{File: confPath, Text: err.Error()}}
	}
	doc := parse(src, l)
	if ol := newList("command line"); override != "" {
		o := parse([]byte(override), ol)
		if len(o.rules)+len(o.pools)+len(o.top.xforms) > 0 {
			ol.errorf(Pos{}, "want parameters of the top level")
		}
		doc.override(o)
		if ol.Failed() {
			return nil, ol.All()
		}
	}
	if secretsPath == "" {
		secretsPath = doc.secretsFile(confPath)
	}
	c := &Config{Path: confPath, SecretsPath: secretsPath, doc: doc, bare: !withSecrets}
	c.rules = analyse(doc, l)
	c.labels = map[string]bool{}
	for _, r := range c.rules {
		c.labels[r.label] = true
	}

	sl := newList(secretsPath)
	var raw []byte
	if withSecrets {
		raw, err = read(fsys, secretsPath, private, MaxConf)
	}
	defer clear(raw)
	switch {
	case !withSecrets:
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		sl.errorf(Pos{}, "%s", err)
	default:
		c.secrets = parseSecrets(raw, sl, c.hasLabel)
	}
	c.byLabel = map[string][]*secret{}
	for _, s := range c.secrets {
		if !s.pair && (s.local.Len() > 0 || s.remote.Len() > 0) {
			for _, lb := range s.labels {
				c.byLabel[lb.text] = append(c.byLabel[lb.text], s)
			}
		}
	}
	// Without all of the secrets nothing is known to be missing.
	if withSecrets && !l.Failed() && !sl.Failed() {
		c.checkSecrets(l)
	}
	ds := append(l.All(), sl.All()...)
	if Failed(ds) {
		c.Wipe()
		return nil, ds
	}
	c.globals()
	return c, ds
}

// analyse gives a document its meaning; after lexical errors there is none.
func analyse(doc *document, l *list) []*rule {
	if doc.unread {
		return nil
	}
	return (&checker{l: l, doc: doc, defaults: defaults}).check()
}

// override puts the parameters of o's top level in the place of d's.
func (d *document) override(o *document) {
	if d.unread {
		return
	}
	for _, p := range o.top.params {
		d.top.by[p.kw.key()] = o.top.by[p.kw.key()]
	}
	d.top.params = slices.DeleteFunc(d.top.params, func(p *param) bool { return o.top.one(p.kw.key()) != nil })
	d.top.params = append(d.top.params, o.top.params...)
}

// secretsFile returns the path of the secrets as configured.
func (d *document) secretsFile(confPath string) string {
	p := d.top.one("secrets_file")
	switch {
	case p == nil || p.bad:
		return DefaultSecrets
	case filepath.IsAbs(p.text):
		return p.text
	}
	return filepath.Join(filepath.Dir(confPath), p.text)
}

// care is what a file must be: only the user's own to read; nobody else's to write.
type care bool

const (
	private care = true
	public  care = false
)

// read reads a file of at most most octets. What makes it unfit is checked
// on the open descriptor, so that it cannot be exchanged between.
func read(fsys Files, path string, secret care, most int64) ([]byte, error) {
	f, err := fsys.Open(path)
	if err != nil {
		return nil, fileError(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fileError(err)
	}
	if !fi.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	uid, perm := fsys.UID(), fi.Mode().Perm()
	owner := uid
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st != nil {
		owner = int(st.Uid)
	}
	switch {
	case secret == private && perm&^0o600 != 0:
		return nil, fmt.Errorf("mode %04o; want 0600", perm)
	case secret == private && owner != uid:
		return nil, fmt.Errorf("owned by uid %d; want %d", owner, uid)
	case secret == public && (perm&0o022 != 0 || owner != uid && owner != 0):
		return nil, errors.New("writable by others")
	case fi.Size() > most:
		return nil, fmt.Errorf("larger than %d MiB", most>>20)
	}
	// One buffer, so that no copies of a secret are left behind by growing.
	b := make([]byte, fi.Size()+1)
	n, err := io.ReadFull(f, b)
	switch {
	case err == nil:
		clear(b[:n])
		return nil, errors.New("grew while it was read")
	case err != io.EOF && err != io.ErrUnexpectedEOF:
		clear(b[:n])
		return nil, fileError(err)
	}
	return b[:n:n], nil
}

// fileError leaves out what the message says already.
func fileError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return notFound{}
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

type notFound struct{}

func (notFound) Error() string        { return "no such file" }
func (notFound) Is(target error) bool { return target == fs.ErrNotExist }

// ReadKey reads the file of ike -p @FILE, under the rules of the secrets file:
// all of it less one final newline is the key, hex digits if it begins with 0x.
// The error does not name the file.
func ReadKey(fsys Files, path string) (ipsec.Key, error) {
	b, err := read(fsys, path, private, MaxFile)
	if err != nil {
		return ipsec.Key{}, err
	}
	defer clear(b)
	return ParseKey(b)
}

// ParseKey makes a key of the content of such a file. It takes a copy.
func ParseKey(b []byte) (ipsec.Key, error) {
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
	}
	if n := len(b); n > 0 && b[n-1] == '\r' {
		b = b[:n-1]
	}
	if len(b) > 1 && b[0] == '0' && b[1] == 'x' {
		k, why := hexKey(b[2:])
		if why == "" && k.Len() == 0 {
			why = "empty"
		}
		if why != "" {
			return ipsec.Key{}, errors.New(why)
		}
		return k, nil
	}
	if len(b) == 0 {
		return ipsec.Key{}, errors.New("empty")
	}
	return ipsec.NewKey(append([]byte(nil), b...)), nil
}

// Wipe overwrites every secret of c. Rules made before have their own.
func (c *Config) Wipe() {
	for _, s := range c.secrets {
		s.wipe()
	}
	c.secrets, c.byLabel = nil, nil
}

// Format tells of the files and of how much is in them: fmt would print the
// octets of keys in fields that are not exported.
func (c Config) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "ikeconf.Config(%s: %d rules, %s: %d entries)", c.Path, len(c.rules), c.SecretsPath, len(c.secrets))
}

func (c *Config) hasLabel(s string) bool { return c.labels[s] || c.doc.unread }

// globals fills the fields that belong to no rule.
func (c *Config) globals() {
	get := func(key string) *param {
		if p := c.doc.top.one(key); p != nil {
			return p
		}
		return defaults[key]
	}
	n := func(key string) int { return int(get(key).num) }
	c.IKEPort, c.NATTPort = uint16(n("ike_port")), uint16(n("natt_port"))
	c.CookieThreshold, c.HalfOpen, c.HalfOpenPerSource = n("cookie_threshold"), n("half_open_limit"), n("half_open_per_source")
	c.Expire = time.Duration(get("expire_timer").num) * time.Millisecond
	c.LogLevel = get("log_level").text
}
