// sqld: an SQLite database behind TCP, for a client outside that keeps a log of what
// was acknowledged. One thread, several connections (those that a restored guest
// brings along from its past are dead and must stand in nobody's way); every commit
// is durable (WAL, synchronous=FULL) before it is acknowledged.
//
//   PUT <id>   inserts a row in a transaction of its own    OK <id>
//   HAVE       the ids there are                            HAVE 1-57,60-61
//   CHECK      integrity_check, and every row's content     CHECK ok rows=<n>
//
// Anything that goes wrong is answered ERR <text>.
//
// usage: sqld PORT DIRECTORY
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CLIENTS = 32, BODY = 700 };

static sqlite3 *db;
static sqlite3_stmt *insert;

struct client {
	int fd; // -1: free
	size_t len;
	char line[128];
};

static void die(const char *what) {
	printf("FATAL sqld %s: %s\n", what, db ? sqlite3_errmsg(db) : strerror(errno));
	exit(1);
}

// body is the content that belongs to an id.
static void body(char *out, uint64_t id) {
	uint64_t x = id * 0x9e3779b97f4a7c15ull + 1;
	for (int i = 0; i < BODY; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		out[i] = 'a' + x % 26;
	}
}

static int put(uint64_t id) {
	char text[BODY];
	body(text, id);
	sqlite3_reset(insert);
	sqlite3_bind_int64(insert, 1, (sqlite3_int64)id);
	sqlite3_bind_text(insert, 2, text, BODY, SQLITE_TRANSIENT);
	int rc = sqlite3_step(insert); // a statement of its own is a transaction of its own
	return rc == SQLITE_DONE ? sqlite3_reset(insert) : (sqlite3_reset(insert), rc);
}

static void check(FILE *out) {
	sqlite3_stmt *s;
	if (sqlite3_prepare_v2(db, "PRAGMA integrity_check", -1, &s, NULL) != SQLITE_OK || sqlite3_step(s) != SQLITE_ROW) {
		fprintf(out, "ERR %s\n", sqlite3_errmsg(db));
		sqlite3_finalize(s);
		return;
	}
	char verdict[256];
	snprintf(verdict, sizeof verdict, "%s", (const char *)sqlite3_column_text(s, 0));
	sqlite3_finalize(s);
	uint64_t rows = 0, wrong = 0;
	int rc = sqlite3_prepare_v2(db, "SELECT id, body FROM t", -1, &s, NULL);
	while (rc == SQLITE_OK && (rc = sqlite3_step(s)) == SQLITE_ROW) {
		char want[BODY];
		body(want, (uint64_t)sqlite3_column_int64(s, 0));
		if (sqlite3_column_bytes(s, 1) != BODY || memcmp(want, sqlite3_column_text(s, 1), BODY))
			wrong++;
		rows++;
		rc = SQLITE_OK;
	}
	if (rc != SQLITE_DONE)
		fprintf(out, "ERR %s\n", sqlite3_errmsg(db));
	else if (wrong)
		fprintf(out, "ERR %llu of %llu rows are wrong\n", (unsigned long long)wrong, (unsigned long long)rows);
	else
		fprintf(out, "CHECK %s rows=%llu\n", verdict, (unsigned long long)rows);
	sqlite3_finalize(s);
}

static void have(FILE *out) {
	sqlite3_stmt *s;
	int rc = sqlite3_prepare_v2(db, "SELECT id FROM t ORDER BY id", -1, &s, NULL);
	uint64_t first = 0, last = 0;
	int any = 0;
	fputs("HAVE ", out);
	while (rc == SQLITE_OK && (rc = sqlite3_step(s)) == SQLITE_ROW) {
		uint64_t id = (uint64_t)sqlite3_column_int64(s, 0);
		if (any && id == last + 1) {
			last = id;
		} else {
			if (any)
				fprintf(out, "%llu-%llu,", (unsigned long long)first, (unsigned long long)last);
			first = last = id;
			any = 1;
		}
		rc = SQLITE_OK;
	}
	if (rc != SQLITE_DONE)
		fprintf(out, "ERR %s\n", sqlite3_errmsg(db));
	else if (any)
		fprintf(out, "%llu-%llu\n", (unsigned long long)first, (unsigned long long)last);
	else
		fputs("-\n", out);
	sqlite3_finalize(s);
}

// answer runs one command; a client that does not take the answer is dropped.
static int answer(int fd, const char *line) {
	char *text = NULL;
	size_t len = 0;
	FILE *out = open_memstream(&text, &len);
	if (!out)
		return -1;
	if (!strncmp(line, "PUT ", 4)) {
		uint64_t id = strtoull(line + 4, NULL, 10);
		if (put(id) == SQLITE_OK)
			fprintf(out, "OK %llu\n", (unsigned long long)id);
		else
			fprintf(out, "ERR %s\n", sqlite3_errmsg(db));
	} else if (!strcmp(line, "HAVE"))
		have(out);
	else if (!strcmp(line, "CHECK"))
		check(out);
	else
		fputs("ERR unknown command\n", out);
	fclose(out);
	struct timeval limit = {.tv_sec = 5};
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	size_t done = 0;
	while (done < len) {
		ssize_t k = send(fd, text + done, len - done, MSG_NOSIGNAL);
		if (k <= 0)
			break;
		done += k;
	}
	free(text);
	return done == len ? 0 : -1;
}

static int serve(struct client *c) {
	ssize_t k = read(c->fd, c->line + c->len, sizeof c->line - 1 - c->len);
	if (k <= 0)
		return -1;
	c->len += k;
	c->line[c->len] = 0;
	for (char *nl; (nl = strchr(c->line, '\n'));) {
		*nl = 0;
		if (answer(c->fd, c->line))
			return -1;
		c->len -= nl + 1 - c->line;
		memmove(c->line, nl + 1, c->len + 1);
	}
	return c->len < sizeof c->line - 1 ? 0 : -1;
}

static void open_database(const char *dir) {
	char path[256];
	if (mkdir(dir, 0755) && errno != EEXIST)
		die(dir);
	snprintf(path, sizeof path, "%s/test.db", dir);
	if (sqlite3_open(path, &db) != SQLITE_OK)
		die("open");
	if (sqlite3_exec(db, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=64;"
			     "CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, body TEXT NOT NULL);"
			     "CREATE INDEX IF NOT EXISTS t_body ON t(body);",
			 NULL, NULL, NULL) != SQLITE_OK ||
	    sqlite3_prepare_v2(db, "INSERT INTO t(id, body) VALUES(?1, ?2)", -1, &insert, NULL) != SQLITE_OK)
		die("prepare");
}

int main(int argc, char **argv) {
	if (argc != 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGPIPE, SIG_IGN);
	open_database(argv[2]);
	int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (void *)&a, sizeof a) || listen(listener, 16))
		die("listen");
	static struct client clients[CLIENTS];
	for (int i = 0; i < CLIENTS; i++)
		clients[i].fd = -1;
	for (;;) {
		struct pollfd p[CLIENTS + 1] = {{.fd = listener, .events = POLLIN}};
		for (int i = 0; i < CLIENTS; i++)
			p[i + 1] = (struct pollfd){.fd = clients[i].fd, .events = POLLIN};
		if (poll(p, CLIENTS + 1, -1) < 0)
			continue;
		for (int i = 0; i < CLIENTS; i++)
			if (p[i + 1].revents && serve(&clients[i])) {
				close(clients[i].fd);
				clients[i].fd = -1;
			}
		if (!p[0].revents)
			continue;
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), slot = 0;
		while (slot < CLIENTS && clients[slot].fd >= 0)
			slot++;
		if (fd < 0)
			continue;
		if (slot == CLIENTS) {
			close(fd);
			continue;
		}
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		clients[slot] = (struct client){.fd = fd};
	}
}
