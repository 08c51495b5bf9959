/*
 * pfkey-preload.so lets programs that manage the IPsec of a kernel by PF_KEYv2
 * (RFC 2367) manage that of missiu, unchanged: preloaded into them (ld.so(8),
 * LD_PRELOAD) it turns socket(PF_KEY, SOCK_RAW, PF_KEY_V2) into a connection to
 * missiu's socket, and keeps what such programs rely on:
 *
 *   send()        fails for a malformed header as Linux's does; when it returns,
 *                 the answer is in the receive queue (or a bound has passed)
 *   setsockopt()  policies of sockets that say "in clear", as key daemons ask for
 *                 their own port, succeed without effect: missiu exempts IKE
 *   UDP 4500      is missiu's; a bind that fails for that reason says so
 *
 * The descriptor is a SOCK_SEQPACKET one of AF_UNIX bound to an abstract name,
 * by which send() knows it again in whatever process it has got to: OpenIKED
 * opens it in one process and passes it to another. Nothing is remembered here.
 * All other sockets and files are passed on untouched.
 *
 * pfkey-preload(8) is the manual.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <linux/ipsec.h>
#include <linux/pfkeyv2.h>
#include <linux/sockios.h>
#include <linux/udp.h>
#include <linux/xfrm.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#define DIRECTORY "/run/missiu"
#define SUFFIX ".pfkey"
#define MARK "missiu-pfkey-preload-" /* begins the abstract name of our end */

/* How long send() waits, in milliseconds: for missiu to take the request (it
 * handles those of all programs one after the other), then for its answer. The
 * second is short because another thread may have read the answer already. */
#define TAKE_MS 2000
#define ANSWER_MS 250

/* real returns the C library's function of that name. */
static void *real(void **cache, const char *name)
{
	void *f = __atomic_load_n(cache, __ATOMIC_ACQUIRE);
	if (f == NULL) {
		f = dlsym(RTLD_NEXT, name);
		if (f == NULL)
			abort(); /* a C library without socket() */
		__atomic_store_n(cache, f, __ATOMIC_RELEASE);
	}
	return f;
}

#define REAL(fn) static void *fn##_cache; __typeof__(fn) *real_##fn = real(&fn##_cache, #fn)

/* note tells the administrator, in the system log and on a standard error that
 * is a terminal or a pipe: a daemon may have put anything else on descriptor 2. */
__attribute__((format(printf, 1, 2))) static void note(const char *fmt, ...)
{
	char text[512];
	int saved = errno;
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	syslog(LOG_DAEMON | LOG_WARNING, "pfkey-preload: %s", text);
	struct stat st;
	if (fstat(STDERR_FILENO, &st) == 0 && (S_ISCHR(st.st_mode) || S_ISFIFO(st.st_mode)))
		dprintf(STDERR_FILENO, "pfkey-preload: %s\n", text);
	errno = saved;
}

/* ---- the socket ---- */

/* mark binds our end to a name by which it is known again. */
static int mark(int fd)
{
	static unsigned int counter;
	for (int tries = 0; tries < 1000; tries++) {
		struct sockaddr_un sun = {.sun_family = AF_UNIX};
		unsigned int n = __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
		/* The pid is not unique where several pid namespaces share a network. */
		struct timespec ts;
		clock_gettime(CLOCK_MONOTONIC, &ts);
		int len = snprintf(sun.sun_path + 1, sizeof sun.sun_path - 1, MARK "%ld-%u-%lx",
				   (long)getpid(), n, (unsigned long)ts.tv_nsec);
		REAL(bind);
		if (real_bind(fd, (struct sockaddr *)&sun, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len)) == 0)
			return 0;
		if (errno != EADDRINUSE)
			return -1;
	}
	return -1;
}

/* ours tells whether fd is a socket that mark has marked. It keeps errno. */
static bool ours(int fd)
{
	struct sockaddr_un sun;
	socklen_t len = sizeof sun;
	const size_t at = offsetof(struct sockaddr_un, sun_path);
	int saved = errno;
	bool yes = getsockname(fd, (struct sockaddr *)&sun, &len) == 0 && sun.sun_family == AF_UNIX &&
		   len > at + sizeof MARK && sun.sun_path[0] == 0 &&
		   memcmp(sun.sun_path + 1, MARK, sizeof MARK - 1) == 0;
	errno = saved;
	return yes;
}

/* trusted tells whether who listens is root or this process's own user: anybody
 * may take an abstract name that is free, and would be sent keys. */
static bool trusted(int fd)
{
	struct ucred peer;
	socklen_t len = sizeof peer;
	return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0 && (peer.uid == 0 || peer.uid == geteuid());
}

/* dial connects to the socket at path; "@name" is one in the abstract namespace. */
static int dial(const char *path, int flags)
{
	struct sockaddr_un sun = {.sun_family = AF_UNIX};
	size_t n = strlen(path);
	if (n == 0 || n >= sizeof sun.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(sun.sun_path, path, n);
	size_t len = sizeof sun;
	if (path[0] == '@') {
		sun.sun_path[0] = 0;
		len = offsetof(struct sockaddr_un, sun_path) + n;
	}
	REAL(socket);
	/* A non-blocking connect would fail while the listener's queue is full. */
	int fd = real_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	int r;
	do
		r = connect(fd, (struct sockaddr *)&sun, (socklen_t)len);
	while (r < 0 && errno == EINTR);
	if (r == 0 && path[0] == '@' && !trusted(fd)) {
		errno = EACCES;
		r = -1;
	}
	int on = 1;
	if (r < 0 || mark(fd) < 0 ||
	    ((flags & SOCK_NONBLOCK) && ioctl(fd, FIONBIO, &on) < 0) ||
	    (!(flags & SOCK_CLOEXEC) && ioctl(fd, FIONCLEX) < 0)) {
		int saved = errno;
		close(fd);
		errno = saved;
		return -1;
	}
	return fd;
}

/* dial_only connects to the only instance that runs. */
static int dial_only(int flags)
{
	DIR *d = opendir(DIRECTORY);
	if (d == NULL)
		return -1;
	int fd = -1, err = ENOENT;
	char first[NAME_MAX + 1] = "";
	for (struct dirent *e; (e = readdir(d)) != NULL;) {
		size_t n = strlen(e->d_name);
		if (n <= sizeof SUFFIX - 1 || strcmp(e->d_name + n - (sizeof SUFFIX - 1), SUFFIX) != 0)
			continue;
		char path[sizeof DIRECTORY + 1 + NAME_MAX];
		snprintf(path, sizeof path, DIRECTORY "/%s", e->d_name);
		int c = dial(path, flags);
		if (c < 0 && (errno == ECONNREFUSED || errno == ENOENT))
			continue; /* left by an instance that was killed */
		if (first[0] != 0) {
			note("several instances of missiu run (" DIRECTORY "/%s, %s): choose by MISSIU_PFKEY=path", first, path);
			if (c >= 0)
				close(c);
			if (fd >= 0)
				close(fd);
			fd = -1;
			err = EAFNOSUPPORT;
			break;
		}
		strcpy(first, e->d_name);
		fd = c;
		if (c < 0)
			err = errno;
	}
	closedir(d);
	errno = err;
	return fd;
}

/* open_pfkey is socket(PF_KEY, ...) with Linux's errors; EAFNOSUPPORT, as from a
 * kernel without PF_KEY, when no missiu runs. */
static int open_pfkey(int type, int protocol)
{
	int flags = type & (SOCK_CLOEXEC | SOCK_NONBLOCK);
	if ((type & ~flags) != SOCK_RAW) {
		errno = ESOCKTNOSUPPORT;
		return -1;
	}
	if (protocol != PF_KEY_V2) {
		errno = EPROTONOSUPPORT;
		return -1;
	}
	const char *path = secure_getenv("MISSIU_PFKEY");
	int fd = path != NULL && path[0] != 0 ? dial(path, flags) : dial_only(flags);
	if (fd < 0) {
		switch (errno) {
		case EACCES:
		case EPERM:
			errno = EACCES;
			break;
		case EMFILE:
		case ENFILE:
		case ENOMEM:
		case ENOBUFS:
			break;
		default:
			errno = EAFNOSUPPORT;
		}
	}
	return fd;
}

EXPORT int socket(int domain, int type, int protocol)
{
	if (domain == PF_KEY)
		return open_pfkey(type, protocol);
	REAL(socket);
	return real_socket(domain, type, protocol);
}

/* ---- requests ---- */

static long now_ms(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000L + ts.tv_nsec / 1000000;
}

/* gather copies the front of the vectors and tells the length of all. */
static size_t gather(const struct iovec *iov, size_t n, void *front, size_t want)
{
	size_t total = 0;
	for (size_t i = 0; i < n; i++) {
		if (total < want && iov[i].iov_len > 0) {
			size_t part = iov[i].iov_len < want - total ? iov[i].iov_len : want - total;
			memcpy((char *)front + total, iov[i].iov_base, part);
		}
		total += iov[i].iov_len;
	}
	return total;
}

/* check is what Linux looks at before it answers; 0 or the errno of send(). */
static int check(const struct sadb_msg *m, size_t len)
{
	if (len < sizeof *m)
		return EMSGSIZE;
	if (m->sadb_msg_version != PF_KEY_V2 || m->sadb_msg_reserved != 0 ||
	    m->sadb_msg_type == SADB_RESERVED || m->sadb_msg_type > SADB_MAX)
		return EINVAL;
	if (m->sadb_msg_len < 2 || (size_t)m->sadb_msg_len * 8 != len)
		return EMSGSIZE;
	return 0;
}

/* answers tells whether a is an answer to the request q. */
static bool answers(const struct sadb_msg *q, const struct sadb_msg *a)
{
	uint8_t type = q->sadb_msg_type;
	if (a->sadb_msg_type != type && !(type == SADB_X_SPDSETIDX && a->sadb_msg_type == SADB_X_SPDADD))
		return false;
	if (type == SADB_X_MIGRATE && a->sadb_msg_errno == 0)
		return true; /* announced to all, with neither pid nor seq */
	if (a->sadb_msg_pid != q->sadb_msg_pid)
		return false;
	if ((type == SADB_DUMP || type == SADB_X_SPDDUMP) && a->sadb_msg_errno == 0)
		return true; /* numbered by themselves */
	return a->sadb_msg_seq == q->sadb_msg_seq;
}

/* queued counts the answers to q in the receive queue, which it walks by
 * peeking at an offset (socket(7), SO_PEEK_OFF); -1 if that cannot be done. */
static int queued(int fd, const struct sadb_msg *q)
{
	int n = 0, waiting = 0;
	if (ioctl(fd, FIONREAD, &waiting) < 0)
		return -1;
	for (int off = 0; off < waiting;) {
		struct sadb_msg a;
		if (setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off) < 0) {
			n = -1;
			break;
		}
		ssize_t len = recv(fd, &a, sizeof a, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);
		if (len <= 0)
			break;
		if ((size_t)len >= sizeof a && answers(q, &a))
			n++;
		off += (int)len;
	}
	const int none = -1;
	setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &none, sizeof none);
	return n;
}

/* wait_answer returns when more answers to q than before are queued, when the
 * connection has ended, or when it has waited long enough. */
static void wait_answer(int fd, const struct sadb_msg *q, int before)
{
	long start = now_ms(), deadline = start + TAKE_MS;
	bool taken = false;
	for (long pause = 50;; pause = pause < 1000 ? pause * 2 : pause) {
		int n = queued(fd, q);
		if (n < 0 || n > before)
			return;
		int unread = 0;
		if (!taken && ioctl(fd, SIOCOUTQ, &unread) == 0 && unread == 0) {
			taken = true;
			deadline = now_ms() + ANSWER_MS;
		}
		long left = deadline - now_ms();
		if (left <= 0)
			return;
		/* With older messages queued poll() would return at once. */
		int waiting = 0;
		ioctl(fd, FIONREAD, &waiting);
		struct pollfd p = {.fd = fd, .events = waiting == 0 ? POLLIN : 0};
		if (waiting == 0) {
			poll(&p, 1, left < 5 ? (int)left : 5);
		} else {
			struct timespec ts = {.tv_nsec = pause * 1000};
			nanosleep(&ts, NULL);
			poll(&p, 1, 0);
		}
		if (p.revents & (POLLHUP | POLLERR | POLLNVAL))
			return;
	}
}

/* request sends one message as a kernel takes it: whole, at once even on a
 * non-blocking descriptor, answered when it returns. */
static ssize_t request(int fd, const struct msghdr *msg, int flags)
{
	struct sadb_msg q;
	memset(&q, 0, sizeof q);
	size_t len = gather(msg->msg_iov, msg->msg_iovlen, &q, sizeof q);
	int err = check(&q, len);
	if (err != 0) {
		errno = err;
		return -1;
	}
	if (flags & MSG_OOB) {
		errno = EOPNOTSUPP;
		return -1;
	}
	/* The failure report of an ACQUIRE has no answer. */
	bool answered = !(q.sadb_msg_type == SADB_ACQUIRE && len == sizeof q);
	int before = answered ? queued(fd, &q) : 0;

	struct msghdr m = {.msg_iov = msg->msg_iov, .msg_iovlen = msg->msg_iovlen};
	REAL(sendmsg);
	ssize_t r;
	for (long deadline = now_ms() + TAKE_MS;;) {
		r = real_sendmsg(fd, &m, (flags & MSG_DONTWAIT) | MSG_NOSIGNAL);
		if (r >= 0 || (errno != EAGAIN && errno != EINTR) || now_ms() >= deadline)
			break;
		struct pollfd p = {.fd = fd, .events = POLLOUT};
		poll(&p, 1, 10);
	}
	if (r >= 0 && answered && before >= 0) {
		int saved = errno;
		wait_answer(fd, &q, before);
		errno = saved;
	}
	return r;
}

EXPORT ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	if (ours(fd))
		return request(fd, msg, flags);
	REAL(sendmsg);
	return real_sendmsg(fd, msg, flags);
}

static ssize_t request1(int fd, const void *b, size_t n, int flags)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)b, .iov_len = n};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
	return request(fd, &m, flags);
}

EXPORT ssize_t send(int fd, const void *b, size_t n, int flags)
{
	if (ours(fd))
		return request1(fd, b, n, flags);
	REAL(send);
	return real_send(fd, b, n, flags);
}

/* The prototype of glibc for C has a transparent union for the address. */
EXPORT ssize_t sendto(int fd, const void *b, size_t n, int flags, __CONST_SOCKADDR_ARG to, socklen_t tolen)
{
	if (ours(fd))
		return request1(fd, b, n, flags); /* PF_KEY has no addresses */
	REAL(sendto);
	return real_sendto(fd, b, n, flags, to, tolen);
}

EXPORT ssize_t write(int fd, const void *b, size_t n)
{
	if (ours(fd))
		return request1(fd, b, n, 0);
	REAL(write);
	return real_write(fd, b, n);
}

EXPORT ssize_t writev(int fd, const struct iovec *iov, int n)
{
	if (n > 0 && ours(fd)) {
		struct msghdr m = {.msg_iov = (struct iovec *)(uintptr_t)iov, .msg_iovlen = (size_t)n};
		return request(fd, &m, 0);
	}
	REAL(writev);
	return real_writev(fd, iov, n);
}

/* ---- options and ports of other sockets ---- */

/* in_clear tells whether the policy of a socket asks for nothing but clear
 * text. Any other one must not seem to be in force. */
static bool in_clear(bool xfrm, const void *val, socklen_t len)
{
	if (val == NULL || len == 0)
		return true; /* takes one back */
	if (!xfrm) {
		struct sadb_x_policy p;
		if (len < sizeof p)
			return false;
		memcpy(&p, val, sizeof p);
		return p.sadb_x_policy_type == IPSEC_POLICY_NONE || p.sadb_x_policy_type == IPSEC_POLICY_ENTRUST ||
		       p.sadb_x_policy_type == IPSEC_POLICY_BYPASS;
	}
	struct xfrm_userpolicy_info p;
	if (len < sizeof p)
		return false;
	memcpy(&p, val, sizeof p);
	return p.action == XFRM_POLICY_ALLOW && len - sizeof p < sizeof(struct xfrm_user_tmpl);
}

EXPORT int setsockopt(int fd, int level, int name, const void *val, socklen_t len)
{
	bool ipsec = (level == IPPROTO_IP && name == IP_IPSEC_POLICY) || (level == IPPROTO_IPV6 && name == IPV6_IPSEC_POLICY);
	bool xfrm = (level == IPPROTO_IP && name == IP_XFRM_POLICY) || (level == IPPROTO_IPV6 && name == IPV6_XFRM_POLICY);
	if (ipsec || xfrm) {
		if (in_clear(xfrm, val, len))
			return 0;
		note("missiu has no IPsec policies of single sockets other than bypass");
		errno = EOPNOTSUPP;
		return -1;
	}
	int encap = 0;
	if (level == IPPROTO_UDP && name == UDP_ENCAP && len >= sizeof encap) {
		memcpy(&encap, val, sizeof encap);
		if (encap == UDP_ENCAP_ESPINUDP || encap == UDP_ENCAP_ESPINUDP_NON_IKE) {
			note("ESP in UDP is missiu's and port 4500 with it: run this program without NAT traversal");
			errno = ENOPROTOOPT;
			return -1;
		}
	}
	REAL(setsockopt);
	return real_setsockopt(fd, level, name, val, len);
}

/* port returns the UDP or TCP port of an address in host order, 0 if it has none. */
static unsigned int port(const struct sockaddr *sa, socklen_t len)
{
	struct sockaddr_in6 a;
	if (sa == NULL || len < sizeof(struct sockaddr_in) || (sa->sa_family != AF_INET && sa->sa_family != AF_INET6))
		return 0;
	/* sin_port and sin6_port lie at the same place. */
	memcpy(&a, sa, sizeof(struct sockaddr_in));
	return ntohs(a.sin6_port);
}

EXPORT int bind(int fd, __CONST_SOCKADDR_ARG addr, socklen_t len)
{
	REAL(bind);
	int r = real_bind(fd, addr, len);
	if (r < 0 && errno == EADDRINUSE && port(addr.__sockaddr__, len) == 4500)
		note("UDP port 4500 is missiu's, for ESP in UDP: run this program without NAT traversal");
	return r;
}
