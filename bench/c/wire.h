/* What the stand-in upstream and the clients share: clocks, sockets, HTTP/1.1 framing.

   Only what is needed between the two and a proxy on loopback; no part of it is fit to meet a stranger. */

#ifndef WIRE_H
#define WIRE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define READ_AT_ONCE (256 * 1024)

/* In the text of each delta: "@t", when it was sent (CLOCK_MONOTONIC, ns), how late that was (us). */
#define STAMP_LENGTH 31
#define STAMP_FORMAT "@t%019lld.%08lld;"

static inline int64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * SECOND + at.tv_nsec;
}

static inline void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* Write a number with leading zeros; the digits' place is of fixed width. */
static inline void put_digits(char *at, int width, int64_t number) {
    while (width-- > 0) {
        at[width] = (char)('0' + number % 10);
        number /= 10;
    }
}

static inline int64_t digits(const char *at, int width) {
    int64_t number = 0;
    for (int i = 0; i < width; i++) number = number * 10 + (at[i] - '0');
    return number;
}

static inline void watch(int epoll, int how, int fd, uint32_t events, void *whose) {
    struct epoll_event event = {.events = events, .data.ptr = whose};
    if (epoll_ctl(epoll, how, fd, &event) < 0) fail("epoll_ctl");
}

static inline int new_timer(int epoll) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer < 0) fail("timerfd_create");
    watch(epoll, EPOLL_CTL_ADD, timer, EPOLLIN, NULL);
    return timer;
}

static inline void set_timer(int timer, int64_t at) {
    struct itimerspec when = {.it_value = {.tv_sec = at / SECOND, .tv_nsec = at % SECOND}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL) < 0) fail("timerfd_settime");
}

static inline void no_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* A request or an answer that is being read. */
typedef struct {
    enum { HEAD, SIZED, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER, UNTIL_CLOSE, DONE } part;
    bool is_answer, closes;
    int status;
    int64_t left; /* of the body or of the chunk */
    bool line_is_empty;
    size_t head_length;
    char head[16 * 1024];
} Message;

typedef void (*Sink)(void *whose, const char *data, size_t length);

static inline void begin_message(Message *message, bool is_answer) {
    message->part = HEAD;
    message->is_answer = is_answer;
    message->closes = false;
    message->status = 0;
    message->head_length = 0;
}

/* The value of a header, with its name in lower case and its colon; NULL if it is not there. */
static inline const char *header(const Message *message, const char *name) {
    size_t length = strlen(name);
    for (const char *line = strchr(message->head, '\n'); line != NULL; line = strchr(line, '\n')) {
        line++;
        if (strncasecmp(line, name, length) == 0) return line + length + strspn(line + length, " ");
    }
    return NULL;
}

static inline void end_of_head(Message *message) {
    message->head[message->head_length] = 0;
    if (message->is_answer) {
        message->status = atoi(message->head + strlen("HTTP/1.1 "));
        if (message->status < 200) {
            message->head_length = 0;
            return;
        }
    }
    const char *length = header(message, "content-length:");
    const char *encoding = header(message, "transfer-encoding:");
    const char *connection = header(message, "connection:");
    message->closes = connection != NULL && strncasecmp(connection, "close", 5) == 0;
    if (encoding != NULL && strncasecmp(encoding, "chunked", 7) == 0) {
        message->part = CHUNK_SIZE;
        message->left = 0;
    } else if (length != NULL || !message->is_answer) {
        message->left = length != NULL ? atoll(length) : 0;
        message->part = message->left > 0 ? SIZED : DONE;
    } else {
        message->part = UNTIL_CLOSE;
    }
}

static inline size_t read_head(Message *message, const char *data, size_t length) {
    size_t used = 0;
    while (used < length && message->part == HEAD) {
        if (message->head_length >= sizeof message->head - 1) {
            errno = EMSGSIZE;
            fail("head");
        }
        message->head[message->head_length++] = data[used++];
        if (message->head_length >= 4 &&
            memcmp(message->head + message->head_length - 4, "\r\n\r\n", 4) == 0)
            end_of_head(message);
    }
    return used;
}

static inline int hex(char sign) {
    if (sign >= '0' && sign <= '9') return sign - '0';
    sign |= 0x20;
    return sign >= 'a' && sign <= 'f' ? sign - 'a' + 10 : -1;
}

/* One sign between chunks. */
static inline void read_frame(Message *message, char sign) {
    if (message->part == CHUNK_SIZE) {
        if (hex(sign) >= 0) message->left = message->left * 16 + hex(sign);
        if (sign == '\n') message->part = message->left > 0 ? CHUNK : TRAILER;
        message->line_is_empty = true;
    } else if (message->part == CHUNK_END) {
        if (sign == '\n') message->part = CHUNK_SIZE;
    } else if (sign == '\n') {
        if (message->line_is_empty) message->part = DONE;
        message->line_is_empty = true;
    } else if (sign != '\r') {
        message->line_is_empty = false;
    }
}

/* Read on; the body's bytes go to the sink. Returns how much was used: less than all only when it is done. */
static inline size_t read_message(Message *message, const char *data, size_t length, Sink sink, void *whose) {
    size_t used = 0;
    while (used < length && message->part != DONE) {
        if (message->part == HEAD) {
            used += read_head(message, data + used, length - used);
        } else if (message->part == SIZED || message->part == CHUNK || message->part == UNTIL_CLOSE) {
            size_t piece = length - used;
            if (message->part != UNTIL_CLOSE && (int64_t)piece > message->left) piece = message->left;
            sink(whose, data + used, piece);
            used += piece;
            message->left -= piece;
            if (message->left == 0 && message->part == SIZED) message->part = DONE;
            if (message->left == 0 && message->part == CHUNK) message->part = CHUNK_END;
        } else {
            read_frame(message, data[used++]);
        }
    }
    return used;
}

/* Both programs end with the one that started them. */
static inline void begin_program(void) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    signal(SIGPIPE, SIG_IGN);
}

#endif
